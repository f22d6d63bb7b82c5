"""Which files of a dataset's folder are read: parts and configurations are told apart in every layout, and never mixed."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_format_shapes import exchange, read
from vlit.errors import DataError


def write(folder: Path, *names: str) -> Path:
    """Tables of one row each, whose answer is the file's own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"question": "Which file?", "answer": name}]), folder / name)
    return folder


def answers(folder: Path, **settings: str) -> list[str]:
    return [exchange(record)[1] for record in read("hf_datasets", folder, **settings)]


CONVERTED = ("default/test/0000.parquet", "default/train/0000.parquet", "default/train/0001.parquet")
REPOSITORY = ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet")
CONFIGURATIONS = ("ai2d/train-00000-of-00001.parquet", "vqav2/train-00000-of-00001.parquet")
ODD = ("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet", "data/extra-0-of-1.parquet")


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        (CONVERTED, {}, CONVERTED[1:]),
        (CONVERTED, {"split": "test", "config": "default"}, CONVERTED[:1]),
        (("a/partial-train/0.parquet", "a/partial-test/0.parquet"), {}, ["a/partial-train/0.parquet"]),
        (REPOSITORY, {}, REPOSITORY[:1]),
        (REPOSITORY, {"split": "validation"}, REPOSITORY[1:]),
        (REPOSITORY[1:], {}, REPOSITORY[1:]),
        (CONFIGURATIONS, {"config": "ai2d"}, CONFIGURATIONS[:1]),
        (("a/train/0.parquet", "a/test/0.parquet", "b/train/0.parquet"), {"config": "a"}, ["a/train/0.parquet"]),
        (ODD, {"split": "train_sft"}, ODD[:1]),
        (ODD, {"split": "extra"}, ODD[2:]),
        (("sft/a.parquet", "gen/a.parquet"), {"split": "sft"}, ["sft/a.parquet"]),
        (("test.parquet", "train.parquet"), {}, ["train.parquet"]),
        (("trains.parquet", "0001.parquet"), {}, ["0001.parquet", "trains.parquet"]),
    ],
)  # fmt: skip
def test_a_split_is_its_own_files_in_order(
    names: tuple[str, ...], settings: dict[str, str], expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert answers(write(tmp_path, *names), **settings) == list(expected)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (CONVERTED, {"split": "val"}, r"holds no split val, but test, train\. Set split to one that is there"),
        (REPOSITORY, {"split": "val"}, r"holds no split val, but train, validation\."),
        (ODD, {}, r"holds no split train, but extra, test_sft, train_sft\."),
        (CONFIGURATIONS, {}, r"holds several configurations: ai2d, vqav2\. Set config to one of them"),
        (CONFIGURATIONS, {"config": "chartqa"}, r"holds no configuration chartqa, but ai2d, vqav2\."),
        ((), {}, r"holds no \.parquet or \.arrow file"),
    ],
)
def test_what_is_not_there_is_an_error_that_names_what_is(
    names: tuple[str, ...], settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as error:
        answers(write(tmp_path, *names), **settings)
    assert str(tmp_path) in str(error.value)


def test_parts_that_datasets_saved_are_told_apart(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"question": "q", "answer": name}]) for name in ("train", "test", "odd")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    parts["odd"].save_to_disk(tmp_path / "one")
    write(tmp_path / "one", "cache-1.parquet")  # not listed in state.json, so no part of the dataset
    assert [answers(tmp_path / "all", split=name) for name in parts] == [["train"], ["test"], ["odd"]]
    assert answers(tmp_path / "one") == ["odd"]
    other = write(tmp_path / "other", *REPOSITORY, "train.parquet")
    (other / "state.json").write_text('{"step": 1}')  # of somebody else
    assert answers(other, split="validation") == [REPOSITORY[1]]
    with pytest.raises(DataError, match=r"holds no split validation, but odd, test, train\."):
        answers(tmp_path / "all", split="validation")
