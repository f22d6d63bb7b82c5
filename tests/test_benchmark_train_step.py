"""The training-step benchmark runs end to end at the tiny size, and its systems compute the same thing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.models import SIZES
from benchmarks.records import CASES, HEADER_TOKENS, make_records
from benchmarks.systems import Job
from benchmarks.systems.turns import Worker
from benchmarks.train_step import REFERENCE, check_agreement, rows_of

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "samples_s", "tokens_s", "peak_memory_mb", "peak_fraction", "seconds_per_step", "seconds_worst", "ratio", "waste",
}  # fmt: skip


def test_a_tiny_run_measures_every_case_and_system_and_they_agree(tmp_path: Path):
    result = tmp_path / "out" / "step.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--size", "tiny", "--steps", "1", "--threads", "1"]
    command += ["--systems", "vlit,transformers", "--json", str(result)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stdout + output.stderr
    written = json.loads(result.read_text())
    known = {"cpu", "cores", "threads", "dtype", "torch", "transformers", "trl", "load_before", "load_after"}
    assert known | {"matmul_peak_before", "matmul_peak_after"} <= written["machine"].keys()

    rows = {(row["case"], row["system"]): row for row in written["rows"]}
    assert list(rows) == list(itertools.product(CASES, ["vlit", "transformers"]))
    size = SIZES["tiny"]
    for (case, system), row in rows.items():
        assert row.keys() == FIGURES | {"case", "system", "note"}
        assert all(row[figure] > 0 for figure in FIGURES - {"waste"}), row
        assert row["peak_fraction"] < 1
        records = make_records(CASES[case], size, written["settings"]["batches"][case])
        assert row["tokens_s"] / row["samples_s"] == pytest.approx(records.num_tokens / len(records.samples))
        longest = max(len(sample) for sample in records.samples)
        padded = 1 - records.num_tokens / (longest * len(records.samples))
        assert row["waste"] == pytest.approx(0.0 if system == "vlit" else padded), "vlit packs, transformers pads"
    for case, check in written["loss"].items():
        assert check["agree"], check
        assert check["loss"].keys() == check["grad_norm"].keys() == {"vlit", "transformers"}
        assert abs(check["loss"]["vlit"] - np.log(size.vocabulary)) < 0.5, case
        assert rows[case, REFERENCE]["ratio"] == 1
    assert "tiny, bf16, matmul peak" in output.stdout


@pytest.mark.parametrize("case", CASES)
def test_records_have_the_lengths_they_claim(case: str):
    size = replace(SIZES["small"], image_size=28)
    records = make_records(CASES[case], size, 1200)
    header = 1 if case == "stage1" else HEADER_TOKENS
    text = np.array([len(sample) - size.image_tokens for sample in records.samples])
    labels = np.array([sample.num_label_tokens for sample in records.samples])
    mean, supervised = {"stage1": (21, 1.0), "stage2": (216, 0.7), "shared_image": (81, 26 / 46)}[case]
    assert text.mean() == pytest.approx(mean, rel=0.04)
    assert labels.sum() / (text - header).sum() == pytest.approx(supervised, abs=0.02)
    assert labels.min() > 0
    assert len(records.pixels) == 1200 // CASES[case].records_per_image
    for sample in records.samples[:50]:
        assert sample.is_image.sum() == size.image_tokens == np.flatnonzero(sample.is_image).max() - header + 1
        labelled = np.flatnonzero(sample.labels >= 0)
        assert (sample.labels[labelled] == sample.input_ids[labelled + 1]).all()
        assert sample.input_ids.max() < size.vocabulary - 1, "the last word marks images in transformers"
    again = make_records(CASES[case], size, 7)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(again.samples, records.samples[:7], strict=True))


def test_a_wrong_loss_or_gradient_is_noticed():
    def worker(system: str, loss: float, norm: float) -> Worker:
        made = Worker.__new__(Worker)
        made.job = Job(system, "stage1", "tiny", 4, Path(), 1, "cpu", 8192)
        made.failed, made.steps = None, [{"loss": loss, "grad_norm": norm}]
        return made

    assert check_agreement([worker("vlit", 7.0, 1.0), worker("transformers", 7.001, 1.005)])["agree"]
    assert not check_agreement([worker("vlit", 7.0, 1.0), worker("transformers", 7.02, 1.005)])["agree"]
    assert not check_agreement([worker("vlit", 7.0, 1.0), worker("transformers", 7.001, 1.1)])["agree"]


def test_a_system_that_fails_has_a_row_that_says_why_and_no_figures():
    failed = Worker.__new__(Worker)
    failed.job = Job("trl", "stage1", "tiny", 4, Path(), 1, "cpu", 8192)
    failed.failed, failed.steps, failed.ready = "trl is not installed", [], {}
    (row,) = rows_of([failed], flops=1.0, peak=1.0)
    assert row == {"case": "stage1", "system": "trl", **dict.fromkeys(FIGURES), "note": "trl is not installed"}
