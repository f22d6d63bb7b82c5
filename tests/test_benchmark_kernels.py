"""The kernel table and the GPU command run end to end at tiny size, and what their figures rest on is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import gpu, kernels, timing
from benchmarks.attention import Dense, Packed, Problem, Shape, log_normal, sdpa, shapes, trees
from vlit.kernels.attention.dense import dense_attention

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ABSENT = ("deepspeed", "open_clip", "datasets", "wandb")


def run(module: str, *arguments: str, folder: Path) -> str:
    """Output of a benchmark command in a Python where the packages of ``ABSENT`` cannot be imported."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, "--device", "cpu", "--threads", "1", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def assert_kernel_rows(rows: list[dict]) -> None:
    """Figures or a note in every row, and a ratio of 1 for the fastest peer of each case."""
    best: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        assert {"kernel", "case", "system", "seconds", "tflops", "share", "error", "ratio", "note"} <= row.keys()
        if row["seconds"] is None:
            assert row["note"], row
            assert row["tflops"] is row["share"] is row["error"] is row["ratio"] is None
            continue
        assert row["seconds"] > 0
        assert row["tflops"] > 0
        assert row["share"] > 0
        if row["error"] is not None:
            assert row["error"] < kernels.TOO_FAR, row
        if row["ratio"] is not None and not row["system"].startswith("vlit"):
            best.setdefault((row["kernel"], row["case"]), []).append(row["ratio"])
    assert len(best) > 10
    assert all(max(ratios) == 1.0 for ratios in best.values())


def test_a_quick_kernel_table_has_every_pass_and_shape_and_says_what_did_not_run(tmp_path: Path):
    result = tmp_path / "out" / "kernels.json"
    output = run("benchmarks.kernels", "--json", str(result), folder=tmp_path)
    written = json.loads(result.read_text())
    assert {"cpu", "cores", "threads", "load", "torch", "transformers"} <= written["machine"].keys()
    assert min(written["matmul_tflops"]) > 0
    rows = written["rows"]
    assert_kernel_rows(rows)
    cases = Counter((row["kernel"], row["case"]) for row in rows)
    for shape in shapes("cpu", True):
        for kind in ("forward", "forward+backward"):
            assert cases[f"attention {kind}", str(shape)] >= 3
    unequal = [row for row in rows if "lengths 17" in row["case"] and row["system"].startswith("sdpa")]
    assert {row["note"] for row in unequal} == {"needs records of one length"}
    assert {row["system"] for row in rows if row["kernel"] == "linear_cross_entropy"} >= {"vlit", "eager", "select"}
    assert "TFLOP/s" in output
    assert not list(tmp_path.glob("out/*.part"))


def test_the_gpu_command_runs_on_a_cpu_without_the_part_that_needs_cuda(tmp_path: Path):
    result, page = tmp_path / "out" / "gpu.json", tmp_path / "out" / "gpu.md"
    run("benchmarks.gpu", "--minutes", "60", "--json", str(result), "--markdown", str(page), folder=tmp_path)
    written = json.loads(result.read_text())
    parts = written["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "correctness": "not run: needs CUDA", "kernels": "done", "steps": "done",
    }  # fmt: skip
    assert_kernel_rows(parts["kernels"]["rows"])

    steps = parts["steps"]["rows"]
    assert {row["case"] for row in steps} == {"stage1", "stage2", "shared_image"}
    assert {row["recompute"] for row in steps} == {"none", "selective", "full"}
    assert {row["attention"] for row in steps} == {"auto", "dense"}
    for row in steps:
        assert row["note"] == ""
        assert row["memory_gib"] is None, "the memory of a GPU was not measured"
        assert min(row[key] for key in ("seconds", "samples_s", "tokens_s", "tflops", "share")) > 0
        assert 4 < row["loss"] < 9, "random weights: about log(vocabulary)"
        assert row["samples_s"] * row["seconds"] == pytest.approx(row["samples"])
    by_packing = {row["packing"]: row for row in steps if row["case"] == "shared_image" and row["recompute"] == "none"}
    assert by_packing["shared"]["samples"] == by_packing["unshared"]["samples"] == 12
    assert by_packing["shared"]["positions"] < 0.8 * by_packing["unshared"]["positions"]

    text = page.read_text()
    assert "not run: needs CUDA" in text
    assert text.count("bf16 matmul peak of this run") == 2
    assert "| stage2 " in text
    assert [path.name for path in sorted(result.parent.iterdir())] == ["gpu.json", "gpu.md"]


@pytest.fixture
def options() -> Namespace:
    return Namespace(device="cpu", threads=1, quick=True, size="tiny")


def test_a_part_without_time_is_not_run_and_says_so(options: Namespace, tmp_path: Path):
    found = gpu.run_part("kernels", options, 7.0, tmp_path / "part.json")
    assert found == {"status": "not run: 7 s of its share of the budget were left"}


def test_a_part_that_outstays_its_share_is_stopped_and_keeps_what_it_wrote(options, tmp_path: Path, monkeypatch):
    part = tmp_path / "part.json"
    script = f"import json, time\njson.dump({{'rows': [1], 'command': 'x'}}, open({str(part)!r}, 'w'))\ntime.sleep(60)"
    monkeypatch.setattr(gpu, "arguments_of", lambda *_: ["-c", script])
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    found = gpu.run_part("steps", options, 4.0, part)
    assert found["status"] == "stopped after 4 s, its share of the budget"
    assert found["rows"] == [1]
    assert found["command"].startswith("python -c")


def test_a_part_that_fails_gives_its_exit_status_and_the_tests_their_last_lines(options, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu, "arguments_of", lambda *_: ["-c", "print('E  assert 1 == 2'); raise SystemExit(3)"])
    options.device = "cuda"
    found = gpu.run_part("correctness", options, 60.0, tmp_path / "part.json")
    assert (found["status"], found["tail"]) == ("failed: exit status 3", ["E  assert 1 == 2"])


def test_the_correctness_part_asks_for_the_gpu_tests_of_the_attention_kernels(options, tmp_path: Path):
    wanted = gpu.arguments_of("correctness", options, 60.0, tmp_path / "part.json")
    assert wanted[:4] == ["-m", "pytest", "-m", "gpu"]
    assert "tests/test_attention_triton.py" in wanted


def test_the_head_of_7b_is_compared_with_every_system_and_liger_is_noted_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(kernels, "HEAD", (40, 16, 50, 0.5))
    rows = {row["system"]: row for row in kernels.head_rows(CPU, True, {"rounds": 1})}
    assert {"eager", "select", "vlit", "liger"} <= rows.keys()
    assert rows["vlit"]["error"] < kernels.TOO_FAR
    assert rows["liger"]["seconds"] or rows["liger"]["note"] == "liger_kernel is not installed"


def test_useful_work_counts_visible_pairs_only():
    tree = Shape("tree", 3, 1, 16, *trees(1, 5, 2, 2))
    pairs = sum(range(1, 6)) + 2 * ((5 + 1) + (5 + 2))
    assert tree.flops == 4 * 16 * 3 * pairs
    assert Shape("encoder", 2, 2, 8, (3, 3), causal=False).flops == 4 * 8 * 2 * 18


def test_drawn_lengths_fill_the_row():
    lengths = log_normal(8192, 800, 0.5, 600)
    assert sum(lengths) == 8192
    assert all(length > 600 for length in lengths[:-1])
    assert all(shape.segments.num_tokens in (8192, 8280) for shape in shapes("cuda", False))


@pytest.mark.parametrize("shape", shapes("cpu", True), ids=str)
def test_exact_results_are_those_of_pytorch_in_fp32(shape: Shape):
    problem = Problem(shape, CPU)
    problem.inputs = [x.float() for x in problem.inputs]
    problem.d_out_THE = problem.d_out_THE.float()
    if shape.causal:
        found = Packed(problem, dense_attention)(True)
        assert timing.relative_error(found, problem.exact) < 1e-6
    if problem.dense is not None:
        dense = Dense(problem, lambda *x, scale: sdpa(*x, scale=scale, causal=shape.causal), torch.float32)
        assert timing.relative_error(dense.packed(dense(True)), problem.exact) < 1e-6


def test_a_wrong_kernel_is_noted_and_no_peer():
    shape = Shape("one", 2, 2, 16, (20,))
    problem = Problem(shape, CPU)

    def without_mask(q, k, v, *, segments, scale):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0].transpose(0, 1)

    systems = {"peer": Packed(problem, dense_attention), "hasty": Packed(problem, without_mask)}
    errors = {name: timing.relative_error(system(False), problem.exact[:1]) for name, system in systems.items()}
    calls = {name: lambda system=system: system(False) for name, system in systems.items()}
    rows = kernels.rows_of("attention", "one", calls, errors, {}, shape.flops, CPU, {"rounds": 1})
    peer, hasty = rows
    assert (peer["ratio"], peer["note"]) == (1.0, "")
    assert hasty["ratio"] is None
    assert "wrong" in hasty["note"]


def test_systems_take_turns_and_one_that_fails_gives_the_reason():
    order: list[str] = []

    def broken() -> None:
        raise ValueError("needs  another\nmachine")

    def fails_late() -> None:
        if len(order) > 4:
            raise ModuleNotFoundError("", name="somewhere")

    systems = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": broken, "d": fails_late}
    found = timing.interleaved(systems, CPU, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert found["c"] == "ValueError: needs another machine"
    assert found["d"] == "somewhere is not installed"
    assert list(found) == list(systems)
    assert isinstance(found["a"], timing.Timing)
    assert found["a"].rounds == 3


def test_the_median_is_that_of_one_call_and_the_deadline_ends_the_rounds():
    seconds = {"short": iter([1.0, 0.002, 0.003, 0.001, 0.009]), "long": iter([1.0, 0.05, 0.05, 0.06, 0.01])}
    asked: list[tuple[str, int]] = []

    def clock(call, calls: int, device: torch.device) -> float:
        asked.append((call(), calls))
        return next(seconds[call()])

    found = timing.interleaved({n: lambda n=n: n for n in seconds}, CPU, rounds=3, round_seconds=0.02, clock=clock)
    assert found == {"short": timing.Timing(0.003, 0.001, 3, 10), "long": timing.Timing(0.05, 0.01, 3, 1)}
    assert asked[-2:] == [("short", 10), ("long", 1)]
    late = timing.interleaved({"one": lambda: None}, CPU, rounds=50, deadline=time.perf_counter())
    assert late["one"].rounds == 1


def test_tables_leave_empty_columns_out_and_numbers_stand_to_the_right():
    rows = [{"name": "one", "value": 1.5, "note": None}, {"name": "two", "value": None, "note": ""}]
    columns = (("name", "name", ""), ("value", "value", ".2f"), ("note", "note", ""))
    assert timing.table(rows, columns).splitlines() == [
        "| name | value |", "|------|------:|", "| one  |  1.50 |", "| two  |     – |",
    ]  # fmt: skip


def test_no_number_that_json_lacks_is_written(tmp_path: Path):
    path = tmp_path / "result.json"
    timing.write_json(path, {"value": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        timing.write_json(path, {"value": math.nan})
    assert json.loads(path.read_text()) == {"value": 1.0}
