"""The soak of kill -9 with three rounds; ``python -m tests.scale.kill_soak`` does it with as many as one has time for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scale.kill_soak import soak


def test_killed_three_times_on_one_rank_with_a_data_worker_the_end_is_bit_equal(tmp_path: Path) -> None:
    rounds, different = soak("alone", 3, tmp_path)
    assert [r.killed for r in rounds] == ["all processes"] * 3 + ["finished"]
    assert different == []


@pytest.mark.slow
def test_killed_three_times_on_two_ranks_also_one_of_them_alone_the_end_is_bit_equal(tmp_path: Path) -> None:
    rounds, different = soak("ddp", 3, tmp_path)
    assert [r.killed.split()[0] for r in rounds] == ["all", "rank", "rank", "finished"]
    for number in (2, 3):  # who is left ends in time to say why
        assert "does not run any more (killed or crashed)" in (tmp_path / "ddp" / f"round-{number}.log").read_text()
    assert different == []
