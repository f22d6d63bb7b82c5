"""Attention and cross-entropy kernels beside their peers, in bf16:

``python -m benchmarks.kernels [--device cpu|cuda] [--threads N] [--only KERNEL] [--quick] [--seconds S] [--json FILE]``

| figure  | meaning                                                                                                 |
|---------|---------------------------------------------------------------------------------------------------------|
| ms      | median of the turns; all systems of a case take turns in one loop. On a GPU the device's own time. The  |
|         | JSON also has the fastest turn                                                                          |
| TFLOP/s | useful work, whatever a system computes besides: 4·E for each query head and visible pair of query and  |
|         | key, 3.5 times that with the backward pass; 4·D·V for each supervised position of a head, 6·D·V trained |
| peak    | share of the bf16 matmul peak, measured before the first case and after every case; the largest counts  |
| error   | distance to the fp64 result of the same inputs as a share of its norm, for the worst of output and      |
|         | gradients                                                                                               |
| ratio   | time of the fastest peer / time of the system; peers are the systems that are not vlit's                |

The attention systems are described in :mod:`benchmarks.attention`, those of the cross-entropy in
:mod:`benchmarks.cross_entropy`; that one chooses its device itself. ``forward`` keeps nothing for a backward pass.

A system that cannot run has no figures and a note that says why; one whose result is wrong is no peer. The JSON is written
anew after every case. With ``--seconds`` no case begins after that time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention, timing
from benchmarks.attention import OWN, PASSES, Packed, Problem, Shape
from vlit.train.distributed import keep_freed_memory

KERNELS = ("attention", "cross_entropy")
FIGURES = ("seconds", "fastest_seconds", "tflops", "share", "error", "ratio")
COLUMNS = (
    ("kernel", "kernel", ""), ("case", "case", ""), ("system", "system", ""), ("ms", "ms", ".3f"), ("TFLOP/s", "tflops", ".3f"),
    ("peak", "share", ".1%"), ("error", "error", ".1e"), ("ratio", "ratio", ".2f"), ("note", "note", ""),
)  # fmt: skip
ROUNDS, ROUND_SECONDS = 15, {"cpu": 0.03, "cuda": 0.01}
HEAD = (8192, 4096, 32_000, 0.2)
"""Positions, width, vocabulary and supervised share of a stage-2 row of LLaVA-1.5-7B."""
TOO_FAR = 0.03
"""Ten times what rounding to bf16 explains."""
Rows = list[dict[str, Any]]


def row(kernel: str, case: str, system: str, note: str = "", **figures: float) -> dict[str, Any]:
    """A line of the result; figures that are not given are None."""
    return {"kernel": kernel, "case": case, "system": system, **dict.fromkeys(FIGURES), **figures, "note": note}


def rows_of(
    kernel: str,
    case: str,
    calls: Mapping[str, Callable[[], object]],
    errors: Mapping[str, float],
    notes: Mapping[str, str],
    flops: float,
    device: torch.device,
    settings: Mapping[str, Any],
) -> Rows:
    """Let ``calls`` take turns; one row each, and one for each system that only has a note."""
    found = timing.interleaved(calls, device, clock=timing.device_seconds, **settings)
    timed = {name: result for name, result in found.items() if not isinstance(result, str)}
    notes = {**notes, **{name: result for name, result in found.items() if isinstance(result, str)}}
    notes |= {name: f"wrong: error above {TOO_FAR}" for name in timed if not errors[name] <= TOO_FAR}  # NaN too
    peers = [t.seconds for name, t in timed.items() if not name.startswith(OWN) and name not in notes]
    rows = []
    for name in {**calls, **notes}:
        if name not in timed:
            rows.append(row(kernel, case, name, notes[name]))
            continue
        seconds, fastest = timed[name].seconds, timed[name].fastest
        figures = {"seconds": seconds, "fastest_seconds": fastest, "tflops": flops / seconds / 1e12}
        if math.isfinite(errors[name]):
            figures["error"] = errors[name]
        if peers and name not in notes:
            figures["ratio"] = min(peers) / seconds
        rows.append(row(kernel, case, name, notes.get(name, ""), **figures))
    return rows


def attention_rows(shape: Shape, device: torch.device, settings: Mapping[str, Any]) -> Rows:
    """Every system on one shape, forward and forward+backward."""
    problem, rows = Problem(shape, device), []
    made: dict[str, Packed] = {}
    unmade: dict[str, str] = {}
    for name, make in attention.systems(problem).items():
        try:
            made[name] = make()
        except Exception as error:
            unmade[name] = timing.reason(error)
    for kind, factor in PASSES.items():
        backward, notes, errors = kind != "forward", dict(unmade), {}
        for name, system in made.items():
            try:
                found = system.packed([x.detach() for x in system(backward)])
                errors[name] = timing.relative_error(found, problem.exact[: len(found)])
            except Exception as error:
                notes[name] = timing.reason(error)
        calls = {name: partial(made[name], backward) for name in errors}
        rows += rows_of(f"attention {kind}", str(shape), calls, errors, notes, shape.flops * factor, device, settings)
    return rows


def head_rows(device: torch.device, trained: bool, settings: Mapping[str, Any]) -> Rows:
    """Loss of the 7B head by the systems of :mod:`benchmarks.cross_entropy`, and by Liger-Kernel where it is installed."""
    from benchmarks.cross_entropy import IGNORE, systems

    positions, width, vocabulary, supervised = HEAD
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, generator=generator, device=device, dtype=torch.bfloat16) * (2 / width**0.5)
    labels = torch.randint(0, vocabulary, (positions,), generator=generator, device=device)
    labels[round(supervised * positions) :] = IGNORE
    inputs = [hidden.requires_grad_(), weight.requires_grad_(trained)]
    in_fp64 = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact = systems(in_fp64[0], in_fp64[1], labels)["select"]()

    def liger() -> list[Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)(weight, hidden, labels)
        return list(torch.autograd.grad(loss, [x for x in inputs if x.requires_grad]))

    errors, notes = {}, {}
    runs = {**systems(hidden, weight, labels), "liger": liger}
    for name, run in runs.items():
        try:
            errors[name] = timing.relative_error(run(), exact)
        except Exception as error:
            notes[name] = timing.reason(error)
    case = f"T{positions} D{width} V{vocabulary} {supervised:.0%} supervised, {'trained' if trained else 'frozen'} head"
    flops = (6 if trained else 4) * round(supervised * positions) * width * vocabulary
    calls = {name: runs[name] for name in errors}
    return rows_of("linear_cross_entropy", case, calls, errors, notes, flops, device, settings)


def cross_entropy_rows(quick: bool) -> Rows:
    """The cases of :mod:`benchmarks.cross_entropy`, their ratios taken to the fastest peer."""
    from benchmarks.cross_entropy import cases

    found = cases(quick)
    rows = []
    for one in found:
        peers = [
            other["seconds"]
            for other in found
            if other["case"] == one["case"] and other["ratio"] is not None and not other["system"].startswith(OWN)
        ]
        figures = {key: one[key] for key in ("seconds", "tflops", "error")}
        if one["ratio"] is not None:
            figures["ratio"] = min(peers) / one["seconds"]
        rows.append(row(one["kernel"], one["case"], one["system"], **figures))
    return rows


def parts(
    device: torch.device, only: str | None, quick: bool, settings: Mapping[str, Any]
) -> Iterator[tuple[str, str, Callable[[], Rows]]]:
    """Kernel, case and measurement of everything that is asked for."""
    if only in (None, "attention"):
        for shape in attention.shapes(device.type, quick):
            yield "attention", str(shape), partial(attention_rows, shape, device, settings)
    if only in (None, "cross_entropy"):
        if device.type == "cuda" and not quick:
            for trained in (True, False):
                yield "linear_cross_entropy", "head of 7B", partial(head_rows, device, trained, settings)
        yield "linear_cross_entropy", "all cases", partial(cross_entropy_rows, quick)


def measure(arguments: argparse.Namespace, start: float) -> dict[str, Any]:
    """Everything the command reports; also what it has written when it is stopped."""
    device, deadline = torch.device(arguments.device), start + (arguments.seconds or math.inf)
    settings: dict[str, Any] = {"rounds": 2 if arguments.quick else ROUNDS, "deadline": deadline}
    settings["round_seconds"] = 0.0 if arguments.quick else ROUND_SECONDS[device.type]
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # FlexAttention: one graph for every shape, pass and grouping
    result: dict[str, Any] = {
        "command": timing.command("benchmarks.kernels"), "machine": timing.machine(device), "matmul_tflops": [], "rows": [],
    }  # fmt: skip
    timing.note_peak(result, device)
    for kernel, case, run in parts(device, arguments.only, arguments.quick, settings):
        if time.perf_counter() > deadline:
            result["rows"].append(row(kernel, case, "", f"not run: {arguments.seconds:.0f} s were over"))
            continue
        try:
            rows = run()
        except Exception as error:
            rows = [row(kernel, case, "", timing.reason(error))]
        result["rows"] += rows
        timing.note_peak(result, device)
        timing.write_json(arguments.json, result)
        print(f"{time.perf_counter() - start:4.0f} s: {kernel}, {case}", file=sys.stderr, flush=True)
    result["machine"]["load_after"] = timing.machine(device)["load"]
    timing.write_json(arguments.json, result)
    return result


def table_of(rows: Rows) -> str:
    """The rows in Markdown."""
    return timing.table([{**r, "ms": None if r["seconds"] is None else r["seconds"] * 1e3} for r in rows], COLUMNS)


def main() -> None:
    start = time.perf_counter()
    parser = timing.parser(__doc__)
    parser.add_argument("--only", choices=KERNELS, help="leave the other kernel out")
    parser.add_argument("--quick", action="store_true", help="does everything run? The figures mean little")
    parser.add_argument("--seconds", type=float, help="begin no case after this time (default: no limit)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as training does: buffers do not come from fresh pages
    result = measure(arguments, start)
    print(table_of(result["rows"]))
    print(f"bf16 matmul peak {max(result['matmul_tflops']):,.3f} TFLOP/s; {result['machine']}")


if __name__ == "__main__":
    main()
