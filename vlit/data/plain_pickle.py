"""Reading a pickle of plain values: lists, dicts, texts, numbers, and nothing that runs.

A pickle may name any function and have it called. Here every name is refused, so what is left of the language builds
containers and texts only (https://docs.python.org/3/library/pickle.html#restricting-globals). Needed for RefCOCO's files,
which were written by Python 2.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from vlit.errors import DataError


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"it names {module}.{name}, which a file of plain values does not")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError("it refers to objects outside of the file")


def load_plain(path: Path) -> Any:
    """The value in a file of plain values.

    Raises:
        DataError: the file cannot be read, is damaged, or holds anything but plain values.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the data path.") from error
    except DataError as error:
        raise DataError(f"{path}: refused, {error}. Use the published file.") from error
    except Exception as error:  # whatever a damaged pickle makes of the machine
        raise DataError(f"{path}: is damaged ({type(error).__name__}: {error}). Download it again.") from error
