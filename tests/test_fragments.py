"""Fragments: whatever tensors are cut into whatever pieces over whatever files, any range of them reads back equal."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vlit.durable import file_sha256
from vlit.errors import CheckpointError
from vlit.train.fragments import Fragment, FragmentReader, write_fragments


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[dict[tuple[str, str], np.ndarray], list[list[Fragment]]]:
    """Tensors by (parameter, kind), and for each file the fragments it holds. Pieces may overlap and be empty."""
    tensors: dict[tuple[str, str], np.ndarray] = {}
    files: list[list[Fragment]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
        for kind in draw(st.sampled_from([("master",), ("master", "exp_avg"), ("master", "exp_avg", "exp_avg_sq")])):
            parameter = f"layers.{number}.weight"
            numel = math.prod(shape)
            values = np.random.default_rng(draw(st.integers(0, 99))).normal(size=numel).astype(np.float32)
            tensors[parameter, kind] = values.reshape(shape)
            cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=4))})
            pieces = list(itertools.pairwise(cuts)) or [(0, 0)]
            pieces += [(start, min(numel, end + 1)) for start, end in pieces[:1] if draw(st.booleans())]
            for start, end in draw(st.permutations(pieces)):
                file = files[draw(st.integers(0, len(files) - 1))]
                piece = Fragment(parameter, kind, shape, start, torch.from_numpy(values[start:end].copy()))
                if all(other.key != piece.key for other in file):
                    file.append(piece)
                else:  # one start twice in a file: the longer of the two
                    file[:] = [
                        max((f, piece), key=lambda x: x.values.numel()) if f.key == piece.key else f for f in file
                    ]
    return tensors, files


@settings(max_examples=80, deadline=None)
@given(cut_tensors(), st.data())
def test_any_range_of_tensors_cut_in_any_way_reads_back_equal(
    cut: tuple[dict[tuple[str, str], np.ndarray], list[list[Fragment]]], data: st.DataObject
) -> None:
    tensors, files = cut
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(files))]
        for path, fragments in zip(paths, files, strict=True):
            assert write_fragments(path, fragments) == file_sha256(path)
            with safe_open(str(path), framework="np") as held:  # the format is the library's, not only ours
                assert set(held.keys()) == {fragment.key for fragment in fragments}
                for fragment in fragments:
                    assert np.array_equal(held.get_tensor(fragment.key), fragment.values.numpy())
        reader = FragmentReader(paths)
        assert reader.parameters == {parameter for parameter, _ in tensors}
        for (parameter, kind), values in tensors.items():
            assert torch.equal(reader.whole(parameter, kind), torch.from_numpy(values.copy()))
            start = data.draw(st.integers(0, values.size))
            numel = data.draw(st.integers(0, values.size - start))
            expected = values.reshape(-1)[start : start + numel]
            assert np.array_equal(reader.range(parameter, kind, start, numel).numpy(), expected)


def piece(
    start: int, end: int, *, parameter: str = "w", kind: str = "master", shape: tuple[int, ...] = (2, 5)
) -> Fragment:
    return Fragment(parameter, kind, shape, start, torch.arange(float(start), float(end)))


def reader_of(folder: Path, *files: list[Fragment]) -> FragmentReader:
    paths = [folder / f"{number}.safetensors" for number in range(len(files))]
    for path, fragments in zip(paths, files, strict=True):
        write_fragments(path, fragments)
    return FragmentReader(paths)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([[piece(0, 4)], [piece(5, 10)]], r"values 4 to 10 of the master of w are in none of its 2 files"),
        ([[piece(1, 10)]], r"values 0 to 10 of the master of w"),
        ([[piece(0, 9)]], r"values 9 to 10 of the master of w"),
        ([[piece(0, 10)], [piece(0, 10, shape=(10,))]], r"w is \(10,\), another file says \(2, 5\)"),
    ],
)
def test_a_part_that_is_missing_or_of_another_shape_is_an_error(
    files: list[list[Fragment]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        reader_of(tmp_path, *files)


def test_what_a_checkpoint_does_not_hold_cannot_be_read(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, [piece(0, 10)])
    with pytest.raises(CheckpointError, match=r"holds no exp_avg of w\. Was it written with another optimizer\?"):
        reader.whole("w", "exp_avg")
    for start, numel in ((8, 3), (-1, 2), (10, 1)):
        with pytest.raises(CheckpointError, match=rf"values {start} to {start + numel} of w were asked for"):
            reader.range("w", "master", start, numel)


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}", b"not a file of weights at all"])
def test_a_file_that_is_no_safetensors_file_is_named(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read"):
        FragmentReader([tmp_path / "x.safetensors"])


def test_the_header_says_where_every_piece_belongs(tmp_path: Path) -> None:
    """Readable without vlit: kind, parameter and start in the name, the whole shape in the metadata."""
    write_fragments(tmp_path / "x.safetensors", [piece(0, 4), piece(4, 10)])
    with safe_open(str(tmp_path / "x.safetensors"), framework="np") as held:
        assert sorted(held.keys()) == ["master|w|0", "master|w|4"]
        assert {json.loads(shape)[0] for shape in held.metadata().values()} == {2}
