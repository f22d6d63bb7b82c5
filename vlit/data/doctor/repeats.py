"""Records that share an id. Exact: ids are compared as a whole, and so is content where its hashes are equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlit.data.doctor.checks import Finding
from vlit.data.doctor.records import content_of, read_samples


def find_repeats(table: Any, keys: np.ndarray) -> Iterator[tuple[int, Finding]]:
    """(row, finding) of every record whose id an earlier record of the file has.

    ``duplicate``: it also has the content of an earlier record of that id. ``same_id``: it is another record.

    Args:
        keys: int64 [rows], :func:`~vlit.data.doctor.records.content_key` of each row.
    """
    ids = table.column("id").combine_chunks().dictionary_encode().indices
    code = ids.to_numpy(zero_copy_only=False).astype(np.int64)
    repeated = np.flatnonzero(np.bincount(code)[code] > 1) if len(code) else code
    if not len(repeated):
        return
    record = table.column("record").to_numpy()
    rows = repeated[np.lexsort((repeated, keys[repeated], code[repeated]))]  # by id, content, place in the file
    new_id = np.r_[True, np.diff(code[rows]) != 0]
    new_content = new_id | np.r_[True, np.diff(keys[rows]) != 0]
    group = np.cumsum(new_id) - 1
    first_of_id = np.minimum.reduceat(rows, np.flatnonzero(new_id))[group]
    first_of_content = rows[np.flatnonzero(new_content)][np.cumsum(new_content) - 1]
    for row, by_id, by_content in zip(rows.tolist(), first_of_id.tolist(), first_of_content.tolist(), strict=True):
        if row != by_content and _content(table, row) == _content(table, by_content):
            yield row, Finding("duplicate", f"the same id and content as record {record[by_content]}")
        elif row != by_id:
            yield row, Finding("same_id", f"the same id as record {record[by_id]}, but another record")


def _content(table: Any, row: int) -> bytes:
    return content_of(next(read_samples(table, row, row + 1, "")))
