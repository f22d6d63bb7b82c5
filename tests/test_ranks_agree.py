"""Ranks that each load for themselves must hold the same model; what they share out comes together as of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rank_cases import Case, run_cases
from tests.rank_hooks import Hook
from tests.tiny_run import tiny_run, write_dataset
from vlit.train.run import run_training

pytestmark = pytest.mark.slow


def answers_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    return [sample for row in rows for sample in row["samples"]]


def test_other_weights_on_a_rank_end_the_run_and_dealt_answers_are_those_of_one_process(
    tiny_dir: Path, tmp_path: Path
) -> None:
    held_out = json.dumps({"data": [{"path": str(write_dataset(tiny_dir / "dataset"))}], "every_steps": 1,
                           "max_records": 8, "sample_generations": 3, "max_new_tokens": 6})  # fmt: skip
    words = ("stages.instruct=null", "stages.align.max_steps=2", f"stages.align.validation={held_out}")
    shared = Case(tmp_path / "shared", (*words, "runtime.strategy=ddp"))
    others = {
        part: Case(tmp_path / part, shared.overrides, may_fail=True, hook=Hook(other_weights=module))
        for part, module in (("embeddings", "llm"), ("connector", "connector"))
    }
    done = run_cases(2, [*others.values(), shared], tiny_dir, tmp_path, timeout_s=180)
    assert done.returncode == 0, done.stdout[-4000:]
    for part, case in others.items():
        assert done.stdout.count(f"TrainingError: {part}: rank 1 read other weights than rank 0 (fingerprints ") == 2
        assert not (case.output / "metrics.jsonl").exists()
    run_training(tiny_run(tiny_dir, tmp_path / "alone", *words))
    assert len(answers_of(shared.output)) == 6
    assert answers_of(shared.output) == answers_of(tmp_path / "alone")
