"""C kernels for the CPU, compiled on first use for the machine they run on and kept in the cache folder.

Only what PyTorch has no fast operator for is here. Without a C compiler everything runs through PyTorch, slower and equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.c", "flash.c"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("flash.h", "tiles.h"))
_FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$VLIT_CACHE`` or ``~/.cache/vlit``."""
    root = os.environ.get("VLIT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "vlit") / "kernels"


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be used (no C compiler, not Linux, ``VLIT_NATIVE=0``)."""
    if os.environ.get("VLIT_NATIVE") == "0" or sys.platform != "linux":
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        return None
    try:
        openmp = _share_openmp()
        library = _build(compiler, openmp)
        _refuse_foreign(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        print(
            f"warning: the C attention kernels were not built, PyTorch is used instead ({detail[:300]})",
            file=sys.stderr,
        )
        return None


def _share_openmp() -> bool:
    """Make PyTorch's OpenMP runtime visible, so that both use one pool of threads. False: run single-threaded."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "gomp" in line or "libomp" in line}
    for path in sorted(loaded):
        if "gomp" in Path(path).name:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def _build(compiler: str, openmp: bool) -> Path:
    """The shared library, named by all that decides its content. Written aside and renamed: ranks may race."""
    flags = (*_FLAGS, "-fopenmp" if openmp else "-fopenmp-simd")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    with open("/proc/cpuinfo") as info:
        cpu = next((line for line in info if line.startswith(("flags", "Features"))), platform.machine())
    texts = (path.read_text(encoding="utf-8") for path in (*_SOURCES, *_HEADERS))
    parts = (*texts, version, cpu, " ".join(flags))
    target = cache_folder() / f"kernels-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            aside = Path(folder) / target.name
            compile_flags = [flag for flag in flags if flag != "-shared"]
            objects = []
            for source in _SOURCES:
                objects.append(str(Path(folder) / f"{source.stem}.o"))
                _run(compiler, *compile_flags, "-c", str(source), "-o", objects[-1])
            # linked without an OpenMP library: its symbols come from the one PyTorch has loaded
            _run(compiler, "-shared", *objects, "-o", str(aside), "-lm")
            os.replace(aside, target)
    return target


def _refuse_foreign(library: Path) -> None:
    """PermissionError when somebody else could have put a library of this name into the cache folder."""
    for path in (library, library.parent):
        held = path.stat()
        group = held.st_mode & 0o020 and held.st_gid != os.getgid()
        if held.st_uid not in (os.getuid(), 0) or group or held.st_mode & 0o002:
            raise PermissionError(
                f"{path} can be written by other users, so it is not loaded: set VLIT_CACHE to a folder of your own"
            )


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def softmax_(scores: Tensor, lo: Tensor, hi: Tensor, *, shared: int, scale: float) -> Tensor:
    """softmax(scale · scores) in place over the visible columns ``[0, shared)`` and ``[lo, hi)`` of each row, 0 elsewhere.

    ``scores`` contiguous bf16 ``[B, R, N]``; ``lo``, ``hi`` int64 with R or a divisor of R entries, repeating.
    """
    kernels = compiled()
    assert kernels is not None
    if scores.is_meta:
        return scores
    batch, rows, width = scores.shape
    kernels.vlit_softmax_bf16(
        _pointer(scores), _int(batch), _int(rows), _int(width), _int(len(lo)), _int(shared), _pointer(lo), _pointer(hi),
        ctypes.c_float(scale), torch.get_num_threads(),
    )  # fmt: skip
    return scores


def softmax_backward_(grad: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, *, shared: int, scale: float) -> Tensor:
    """Gradient of the softmax's result -> gradient of the scores, in place; arguments as in :func:`softmax_`."""
    kernels = compiled()
    assert kernels is not None
    if grad.is_meta:
        return grad
    batch, rows, width = grad.shape
    kernels.vlit_softmax_backward_bf16(
        _pointer(grad), _pointer(weights), _int(batch), _int(rows), _int(width), _int(len(lo)), _int(shared), _pointer(lo),
        _pointer(hi), ctypes.c_float(scale), torch.get_num_threads(),
    )  # fmt: skip
    return grad


def copy_heads_(to_HRE: Tensor, from_HRE: Tensor) -> Tensor:
    """``to.copy_(from)`` for equal shapes whose last dimension is contiguous in both."""
    kernels = compiled()
    size = from_HRE.element_size()
    if kernels is None or to_HRE.is_meta or to_HRE.stride(2) != 1 or from_HRE.stride(2) != 1:
        return to_HRE.copy_(from_HRE)
    heads, rows, width = from_HRE.shape
    numbers = (heads, rows, width * size, *(x.stride(d) * size for x in (to_HRE, from_HRE) for d in (0, 1)))
    kernels.vlit_copy_heads(
        _pointer(to_HRE), _pointer(from_HRE), *(_int(number) for number in numbers), torch.get_num_threads()
    )
    return to_HRE


_int = ctypes.c_int64


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
