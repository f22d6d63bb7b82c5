"""Logits apart from all other memory of a planned step, and today's predictions beside those of the measured table."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import memory as bench
from benchmarks.models import Size
from vlit.kernels.planning import Kind
from vlit.plan.hardware import DEVICES, Cluster
from vlit.plan.memory import Parameters, memory
from vlit.plan.trace import MemoryTrace

ROOT = Path(__file__).resolve().parent.parent
SIZE = Size(112, 14, 256, 3, 4, 512, 3, 8, 1376, 8192)
TWO_ROWS = ((8, 160, 1), (8, 160, 1))
W, V = 512, 8192
LOGITS: dict[str, tuple[bench.MemoryCase, Kind, int]] = {
    # 640 positions in one chunk, blocks of 128 rows in fp32, both gradients in bf16
    "CPU, one chunk": (
        bench.MemoryCase("", SIZE, bench.INSTRUCT, rows=TWO_ROWS), "cpu",
        640 * V * 2 + 128 * V * 4 + 640 * W * 2 + V * W * 2,
    ),
    # 2,000 positions in two chunks of 1,000: the head's gradient is summed in fp32 beside the product, cast 512 rows at a time
    "CPU, two chunks": (
        bench.MemoryCase("", SIZE, bench.INSTRUCT, rows=((1, 4000, 1),) * 2), "cpu",
        1000 * V * 2 + 128 * V * 4 + 2000 * W * 2 + V * W * (4 + 2) + 512 * W * 4,
    ),
    # fp32 logits are overwritten where they are
    "CPU, fp32": (
        bench.MemoryCase("", SIZE, bench.INSTRUCT, dtype="float32", rows=TWO_ROWS), "cpu",
        640 * V * 4 + 640 * W * 4 + V * W * 4,
    ),
    "CPU, frozen head": (
        bench.MemoryCase("", SIZE, bench.ALIGN, rows=TWO_ROWS), "cpu", 640 * V * 2 + 128 * V * 4 + 640 * W * 2,
    ),
    # a block is a whole chunk, gradients are fp32; 5,000 positions are two chunks of 2,500
    "GPU, one chunk": (
        bench.MemoryCase("", SIZE, bench.INSTRUCT, rows=TWO_ROWS), "cuda",
        640 * V * (2 + 4) + 640 * W * 4 + V * W * 4,
    ),
    "GPU, two chunks": (
        bench.MemoryCase("", SIZE, bench.INSTRUCT, rows=((1, 10_000, 1),) * 2), "cuda",
        2500 * V * (2 + 4) + 5000 * W * 4 + V * W * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_what_the_head_and_its_loss_hold(name: str) -> None:
    case, kind, expected = LOGITS[name]
    found = bench.predict(case, kind=kind).logits_highest
    assert expected <= found <= expected + 256 * 1024  # and a few numbers a position


@pytest.mark.parametrize("name", ["align, fp32", "instruct, fp32", "vocabulary 96,000", "LoRA", "instruct"])
def test_counting_logits_apart_changes_no_total(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in bench.CASES if case.name == name)
    bench.predict(case)  # the first one of a process holds 24 bytes a token more
    apart = bench.predict(case)
    monkeypatch.setattr(MemoryTrace, "apart", lambda *words: nullcontext())
    together = bench.predict(case)
    assert apart.logits_highest > together.logits_highest == 0
    assert apart.saved == together.saved
    for a, b in ((apart.peak, together.peak), (apart.without_gradients, together.without_gradients)):
        assert (a.total, a.phase, a.operator) == (b.total, b.phase, b.operator)
        assert a.bytes.get("saved", 0) + a.bytes["logits"] == b.bytes.get("saved", 0)


def test_a_peak_in_the_loss_shows_its_logits() -> None:
    (case,) = (case for case in bench.CASES if case.name == "instruct, fp32")
    executed = bench.predict(case)
    parameters = Parameters(1, 0, largest_gathered=0, bytes_each=4)
    found = memory(executed, parameters, Cluster(DEVICES["H100"], 1), "none").components
    positions = 16 * 100
    assert found["logits"] > positions * 512 * 4 + 8192 * 512 * 4  # the gradients alone
    assert found["logits"] == pytest.approx(executed.logits_highest, rel=0.01)


def test_the_memory_table_holds_todays_predictions() -> None:
    rows = json.loads((ROOT / "docs" / "measurements" / "memory_cpu.json").read_text(encoding="utf-8"))["rows"]
    loose = {case.name: case for case in bench.CASES if case.quantize == "none"}
    compared = [row for row in rows if row["case"] in loose]
    assert len(compared) == len(loose) > 10
    for row in compared:
        predicted = bench.predict(loose[row["case"]]).peak.total / 2**20
        assert predicted == pytest.approx(row["predicted_mb"], abs=0.2), row["case"]
