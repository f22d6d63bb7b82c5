"""Errors of other libraries at the border: whatever a damaged or foreign model folder makes them raise is a ModelError.

transformers, timm, open_clip and safetensors raise nearly anything for a file that is not what it should be (KeyError,
TypeError, IndexError, their own classes). A person needs the configuration key, the folder and the reason on one line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from vlit.errors import ModelError, VlitError

_PACKAGES = {"open_clip": "open_clip_torch", "PIL": "pillow", "yaml": "pyyaml"}  # installed under another name
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """ModelError ``what: reason`` for any exception inside; vlit's own errors and a lack of memory pass as they are."""
    try:
        yield
    except (VlitError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        package = _PACKAGES.get(str(error.name), str(error.name).split(".")[0])
        raise ModelError(
            f"{what}: needs a package that is missing ({error}). Install it: pip install {package}."
        ) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ModelError(f"{what}: cannot be used ({reason}). Its files may be damaged: fetch them again.") from error


def reads_model(key: str, *, attribute: str = "path") -> Callable[[F], F]:
    """Decorator for methods of a component's config: errors of libraries name ``key`` and what ``attribute`` holds."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            with library_errors(f'{key} "{getattr(self, attribute)}"'):
                return method(self, *args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate
