"""A record longer than a row has a row of its own, which is full: never more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import metrics_of, tiny_run
from vlit.serve.preview_data import collect_preview
from vlit.train.run import run_training


@pytest.mark.parametrize("room", [16, 8192])
def test_rows_are_never_fuller_than_full(room: int, tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(
        tiny_dir, tmp_path / "out", "stages.instruct=null", "stages.align.max_steps=2",
        f"stages.align.micro_batch_tokens={room}",
    )  # fmt: skip
    run_training(run)
    steps = metrics_of(run)
    for row in steps:
        assert row["fill"] == (1.0 if room == 16 else pytest.approx(row["tokens"] / room))
    rows = collect_preview(run, "align").rows
    assert len(rows) >= len(steps) == 2
    assert {row.num_tokens / row.capacity == 1.0 for row in rows} == {room == 16}
