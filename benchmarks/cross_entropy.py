"""Loss of a language-model head, forward and backward: python -m benchmarks.cross_entropy [--quick] [--json FILE]

Every system gets hidden states of T positions of which a share is supervised, and a head that is trained or frozen, and
returns the gradients of the mean loss. Systems:

- eager: all logits, ``F.linear`` then fp32 ``F.cross_entropy`` with ``ignore_index``, autograd backward;
- select: the same on the supervised positions only;
- torch: ``torch.nn.functional.linear_cross_entropy``, chunked, with its default options, where this PyTorch has it;
- vlit: ``linear_cross_entropy`` on the supervised positions.

Their runs alternate in one loop and the table gives medians. ``tflops`` counts the products of the supervised positions
alone, whatever a system computes; ``peak`` is its share of the rate of ``torch.mm`` on 1024 x 1024 matrices of the same
dtype, timed in the same loop. ``error`` is the distance of the worse gradient to the fp64 gradient of the same inputs, as
a share of that gradient. ``ratio`` is eager's time over the system's. ``MiB`` is the growth of the process at its
largest (CUDA: of the allocated memory), gradients included.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from vlit.kernels.cross_entropy import linear_cross_entropy

IGNORE = -100
ROUNDS = 7
SECONDS_PER_SYSTEM = 9.0
"""A system that has run this long in a case sits out its further rounds."""

Run = Callable[[], list[Tensor]]


def systems(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> dict[str, Run]:
    """Functions that return the gradients of hidden states and, if it is trained, of the head."""
    inputs = [x for x in (hidden_TD, weight_VD) if x.requires_grad]
    positions_L = (labels_T != IGNORE).nonzero()[:, 0]
    targets_L = labels_T[positions_L]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, inputs))

    def exact_logits(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, weight_VD)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    found: dict[str, Run] = {
        "eager": lambda: gradients(F.cross_entropy(exact_logits(hidden_TD), labels_T, ignore_index=IGNORE)),
        "select": lambda: gradients(F.cross_entropy(exact_logits(hidden_TD[positions_L]), targets_L)),
        "vlit": lambda: gradients(
            linear_cross_entropy(hidden_TD[positions_L], weight_VD, targets_L).total / len(targets_L)
        ),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch"] = lambda: gradients(
            F.linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=IGNORE, options=options)
        )
    return found


def observed(run: Run) -> tuple[list[Tensor], float | None]:
    """What one run returns and the growth of memory at its largest, MiB; None where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        return run(), (torch.cuda.max_memory_allocated() - allocated) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return run(), None
    ctypes.CDLL(None).malloc_trim(0)  # memory that malloc kept from earlier runs would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # sets the process's high-water mark to its present size
    before = _status_mib(status, "VmRSS")
    return run(), _status_mib(status, "VmHWM") - before


def _status_mib(status: Path, field: str) -> float:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(found, exact, strict=True))


def measure(
    *, dtype: torch.dtype, positions: int, width: int, vocabulary: int, supervised: float, trained: bool, rounds: int
) -> list[dict[str, Any]]:
    """One row for each system and one for the rate of a matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * (2 / width**0.5)).to(device, dtype)
    labels = torch.randint(0, vocabulary, (positions,), generator=generator)
    num_supervised = round(supervised * positions)
    labels[torch.randperm(positions, generator=generator)[num_supervised:]] = IGNORE
    runs = systems(hidden, weight.requires_grad_(trained), labels.to(device))

    in_fp64 = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(trained))
    exact = systems(*in_fp64, labels.to(device))["select"]()
    errors, memory = {}, {}
    for name, run in runs.items():
        found, memory[name] = observed(run)
        errors[name] = _error(found, exact)
        del found
    del exact, in_fp64

    square = torch.randn(1024, 1024, generator=generator).to(device, dtype)
    matmul: Callable[[], Any] = lambda: torch.mm(square, square)  # noqa: E731
    timed: dict[str, Callable[[], Any]] = {**runs, "torch.mm 1024³": matmul}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            if sum(seconds[name]) < SECONDS_PER_SYSTEM:
                seconds[name].append(_seconds(run))
    median = {name: statistics.median(found) for name, found in seconds.items()}

    head = "trained" if trained else "frozen"
    case = f"{str(dtype)[6:]} T{positions} D{width} V{vocabulary} {supervised:.0%} supervised, {head} head"
    flops = (6 if trained else 4) * num_supervised * width * vocabulary
    return [
        {
            "kernel": "linear_cross_entropy",
            "case": case,
            "system": name,
            "seconds": median[name],
            "tflops": (flops if name in runs else 2 * 1024**3) / median[name] / 1e12,
            "error": errors.get(name),
            "ratio": median["eager"] / median[name] if name in runs else None,
            "peak_mib": memory.get(name),
        }
        for name in timed
    ]


def cases(quick: bool) -> list[dict[str, Any]]:
    """Rows of all cases. ``quick`` shrinks them until only the errors mean something."""
    both = (torch.bfloat16, torch.float32)
    if quick:
        shapes = list(product(both, (96,), (32,)))
    else:
        shapes = [*product(both, (512,), (512, 1024)), *product(both[:1], (2048,), (512, 1024))]
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True, quiet=quick)
    for shape, supervised, trained in track(
        list(product(shapes, (0.2, 1.0), (True, False))), "linear cross-entropy", console=console, transient=True
    ):
        dtype, positions, width = shape
        rows += measure(
            dtype=dtype,
            positions=positions,
            width=width,
            vocabulary=500 if quick else 32000,
            supervised=supervised,
            trained=trained,
            rounds=1 if quick else ROUNDS,
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Rows as a table, a section for each case."""
    shown = Table("case", "system", "ms", "TFLOP/s", "peak", "error", "ratio", "MiB")
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        peak = of_case[-1]["tflops"]
        for row in of_case:
            shown.add_row(
                case if row is of_case[0] else "",
                row["system"],
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['tflops']:.3f}",
                f"{row['tflops'] / peak:.0%}",
                "" if row["error"] is None else f"{row['error']:.1e}",
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            )
        shown.add_section()
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss of a language-model head: speed, error and memory.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only the errors mean something")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU (default: its own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = cases(arguments.quick)
    facts = timing.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    Console(width=160).print(", ".join(f"{key} {value}" for key, value in facts.items()), table(rows))
    timing.write_json(arguments.json, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
