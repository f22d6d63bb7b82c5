"""Training state as named pieces of tensors, whoever holds them: what makes a checkpoint readable on any number of ranks.

A trained parameter has an fp32 ``master`` and its optimizer states (AdamW: ``exp_avg``, ``exp_avg_sq``). A rank holds whole
tensors (one process, DDP) or flat ranges of them (ZeRO), and writes just those, without talking to anybody. A reader asks for
any range of any tensor and gets it put together from whichever files hold parts of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlit.durable import write_file
from vlit.errors import CheckpointError

MASTER = "master"
_PIECE = 16 << 20
"""Bytes handed to the disk at a time."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """The range ``[start, start + values.numel())`` of a flattened tensor of one parameter. ``values`` is fp32, 1-D."""

    parameter: str
    kind: str  # master, or the name of an optimizer state
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """Name of the range in its file, which may hold several of one tensor."""
        return f"{self.kind}|{self.parameter}|{self.start}"

    def copied(self) -> Fragment:
        """The same with values in host memory of their own, so that training may go on changing the original."""
        held = self.values.detach()
        copy = held.clone() if held.device.type == "cpu" else held.to("cpu")
        return Fragment(self.parameter, self.kind, self.shape, self.start, copy)


def num_bytes(fragments: Sequence[Fragment]) -> int:
    """Bytes of the file that holds them, nearly."""
    return sum(4 * f.values.numel() for f in fragments) + 256 * len(fragments)


def write_fragments(path: Path, fragments: Sequence[Fragment]) -> str:
    """Write one safetensors file piece by piece and flush it; returns its sha256.

    safetensors' own writer needs the whole file in memory once more or gives no checksum; the format is a length, a JSON
    header and the raw little-endian values (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {f.key: json.dumps(list(f.shape)) for f in fragments}}
    assert len(header["__metadata__"]) == len(fragments), "two fragments of one tensor begin at the same value"
    offset = 0
    for f in fragments:
        end = offset + 4 * f.values.numel()
        header[f.key] = {"dtype": "F32", "shape": [f.values.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for f in fragments:
            raw = f.values.contiguous().numpy().data.cast("B") if f.values.numel() else memoryview(b"")
            for begin in range(0, len(raw), _PIECE):
                yield raw[begin : begin + _PIECE]

    return write_file(path, chunks())


@dataclass(frozen=True, slots=True)
class _Held:
    path: Path
    key: str
    start: int
    numel: int


class FragmentReader:
    """Random access to the tensors of a checkpoint by parameter, kind and range.

    Raises:
        CheckpointError: parts of a parameter are in no file, or files disagree about its shape.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._folder = files[0].parent if files else Path()
        self._places: dict[tuple[str, str], list[_Held]] = {}  # by kind and parameter, in the order of their starts
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, Any] = {}
        for path in files:
            self._index(path)
        for (kind, parameter), held in self._places.items():
            held.sort(key=lambda place: place.start)
            whole = math.prod(self.shapes[parameter])
            end = 0
            for place in held:
                if place.start > end:
                    break
                end = max(end, place.start + place.numel)
            if end < whole:
                raise CheckpointError(
                    f"{self._folder}: values {end} to {whole} of the {kind} of {parameter} are in none of its {len(files)} "
                    "files. All files of a checkpoint must lie in its folder: output_dir must be on a file system that all "
                    "machines share."
                )

    def _index(self, path: Path) -> None:
        try:
            handle = self._open[path] = safe_open(str(path), framework="pt")
            shapes = {key: tuple(json.loads(raw)) for key, raw in (handle.metadata() or {}).items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from error
        for key, shape in shapes.items():
            kind, parameter, start = key.split("|")
            if self.shapes.setdefault(parameter, shape) != shape:
                raise CheckpointError(f"{path}: {parameter} is {shape}, another file says {self.shapes[parameter]}.")
            numel = handle.get_slice(key).get_shape()[0]
            self._places.setdefault((kind, parameter), []).append(_Held(path, key, int(start), numel))

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that have a master."""
        return {parameter for kind, parameter in self._places if kind == MASTER}

    def range(self, parameter: str, kind: str, start: int, numel: int) -> Tensor:
        """fp32 [numel]: values ``start … start + numel - 1`` of the flattened tensor.

        Raises:
            CheckpointError: the checkpoint holds no such state, as when another optimizer wrote it.
        """
        held = self._places.get((kind, parameter))
        if held is None:
            raise CheckpointError(
                f"{self._folder}: holds no {kind} of {parameter}. Was it written with another optimizer?"
            )
        if start < 0 or start + numel > math.prod(self.shapes[parameter]):
            raise CheckpointError(
                f"{self._folder}: values {start} to {start + numel} of {parameter} were asked for, it is "
                f"{self.shapes[parameter]}."
            )
        out = torch.empty(numel)
        for place in held:
            lo, hi = max(start, place.start), min(start + numel, place.start + place.numel)
            if lo < hi:
                values = self._open[place.path].get_slice(place.key)
                out[lo - start : hi - start] = values[lo - place.start : hi - place.start]
        return out

    def whole(self, parameter: str, kind: str = MASTER) -> Tensor:
        """fp32, in the parameter's shape."""
        shape = self.shapes[parameter]
        return self.range(parameter, kind, 0, math.prod(shape)).reshape(shape)
