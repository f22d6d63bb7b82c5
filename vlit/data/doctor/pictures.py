"""The distinct images of all datasets, numbered, and which records show them. Columns, no Python object an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlit.data.members import member_file, split_member

PER_TASK = 64


class Pictures:
    """Images of several datasets; the same reference into the same folder is one image.

    Args:
        tables: the index of each dataset (see :meth:`vlit.data.index.ArrowRows.table`).
        roots: the image folder of each dataset.
    """

    def __init__(self, tables: Sequence[Any], roots: Sequence[Path], cache_dir: str | None = None) -> None:
        import pyarrow as pa

        self._cache_dir = cache_dir
        self._roots: list[Path] = []
        self._names: list[Any] = []  # pyarrow string arrays, distinct references by folder
        self._starts: list[int] = []
        self._numbers: list[np.ndarray] = [np.empty(0, np.int64)] * len(tables)  # per dataset, of each reference
        self._bounds: list[np.ndarray] = [np.zeros(1, np.int64)] * len(tables)  # per dataset, int64 [rows + 1]
        self._count = 0
        for root in dict.fromkeys(roots):
            members = [dataset for dataset, own in enumerate(roots) if own == root]
            columns = [tables[dataset].column("images").combine_chunks() for dataset in members]
            references = pa.chunked_array([column.flatten() for column in columns], pa.string())
            coded = references.combine_chunks().dictionary_encode()
            numbers = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64) + self._count
            at = 0
            for dataset, column in zip(members, columns, strict=True):
                lengths = column.value_lengths().to_numpy(zero_copy_only=False)
                self._bounds[dataset] = np.r_[0, np.cumsum(lengths, dtype=np.int64)]
                total = int(self._bounds[dataset][-1])
                self._numbers[dataset] = numbers[at : at + total]
                at += total
            self._roots.append(root)
            self._names.append(coded.dictionary)
            self._starts.append(self._count)
            self._count += len(coded.dictionary)

    def __len__(self) -> int:
        return self._count

    def tasks(self) -> Iterator[list[tuple[int, str, str]]]:
        """(number, folder, reference) of all images, some at a time."""
        for root, names, start in zip(self._roots, self._names, self._starts, strict=True):
            for first in range(0, len(names), PER_TASK):
                some = names.slice(first, PER_TASK).to_pylist()
                yield [(start + first + place, str(root), name) for place, name in enumerate(some)]

    def file(self, number: int) -> Path:
        """The file of an image that was looked at and found sound, without checks."""
        folder = int(np.searchsorted(self._starts, number, side="right")) - 1
        name = self._names[folder][number - self._starts[folder]].as_py()
        if member := split_member(name):
            return member_file(self._roots[folder] / member.container, member.name, cache_dir=self._cache_dir)
        return self._roots[folder] / name

    def of_row(self, dataset: int, row: int) -> list[int]:
        """The images of a row, each once."""
        first, last = self._bounds[dataset][row : row + 2]
        return list(dict.fromkeys(self._numbers[dataset][first:last].tolist()))

    def shown_by(self, dataset: int, images: np.ndarray) -> np.ndarray:
        """bool [rows]: the rows that show one of the images; ``images`` is bool [len(self)]."""
        shown = np.zeros(len(self._bounds[dataset]) - 1, bool)
        places = np.flatnonzero(images[self._numbers[dataset]])
        shown[np.searchsorted(self._bounds[dataset], places, side="right") - 1] = True
        return shown
