"""The scaling benchmark at tiny size, and the pictures of the docs from the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.charts import DOCS, draw_all
from benchmarks.scaling import IMAGES, measure


def test_rows_of_the_scaling_benchmark_hold_what_they_say() -> None:
    result = measure("tiny", rounds=1)
    tokens = [point["x"] for point in result["packed_tokens"]]
    assert tokens == sorted(tokens)
    assert len(tokens) == 3
    assert all(point["seconds"] > 0 for point in result["packed_tokens"])
    prefix = 35 + 16  # header and image of the tiny model
    for point in result["records_per_image"]:
        assert point["separate_tokens"] - point["tokens"] == IMAGES * (point["x"] - 1) * prefix
        assert point["separate"] > 0
    assert result["lines"].keys() == {"packed_tokens", "records_per_image"}


def test_the_pictures_of_the_docs_come_from_the_committed_measurements(tmp_path: Path) -> None:
    drawn = draw_all(pictures=tmp_path)
    assert {path.name for path in drawn} == {path.name for path in (DOCS / "img").glob("*.svg")}
    for path in drawn:
        assert path.read_text(encoding="utf-8").startswith("<?xml")
    rows = json.loads((DOCS / "measurements" / "train_step.json").read_text(encoding="utf-8"))["rows"]
    ratio = {row["case"]: row["ratio"] for row in rows if row["system"] == "vlit"}
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert ratio.keys() == {"stage1", "stage2", "shared_image"}
    assert all(f"**{value:.2f}**" in page for value in ratio.values())


def test_no_measurement_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--json first"):
        draw_all(tmp_path, tmp_path)
