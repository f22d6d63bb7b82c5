"""How fast a training step is, beside other trainers: python -m benchmarks.train_step --size small [--json FILE]

Every system trains the same model (:mod:`benchmarks.models`, the same random weights) on the same records
(:mod:`benchmarks.records`) in bf16 with AdamW at the same constant rate, in a process of its own. They take turns step by
step, so that other programs on the machine disturb all alike; only one computes at any time, but all are in memory. (``7b``
does not fit twice: there each system makes all its steps before the next is loaded.) The first step of each is warm-up and
check: loss and gradient norm before any update must agree between the systems. The exit status is 1 when they do not or
when a system fails. All steps see the same batch.

| figure           | meaning                                                                                              |
|------------------|------------------------------------------------------------------------------------------------------|
| samples_s        | records / seconds_per_step                                                                           |
| tokens_s         | tokens of the records / seconds_per_step: an image counts in every record that shows it, padding never |
| seconds_per_step | median over the steps; seconds_worst is the slowest                                                  |
| peak_fraction    | useful FLOPs / seconds_per_step / matmul peak                                                        |
| ratio            | samples_s / that of transformers                                                                     |
| waste            | padding positions / all positions the language model computes                                        |
| peak_memory_mb   | highest memory during the steps less the memory after the imports; on a GPU what torch allocated     |

Useful FLOPs are what the mathematics of the step needs (:mod:`vlit.models.flops`): no padding, no recomputation, logits
at supervised positions only, a prefix that records share once. It is the same number for all systems of a case, so
peak_fraction also shows what a system computes in vain. The matmul peak is measured with the same threads and dtype before
the first case and after the last; the larger counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.models import SIZES, Size, model_config, sizes_as_dict, write_parts
from benchmarks.records import CASES, make_records
from benchmarks.systems import SYSTEMS, Job
from benchmarks.systems.turns import Worker, fresh_processes, take_turns
from benchmarks.systems.worker import NOT_INSTALLED

REFERENCE = "transformers"
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-4, 1e-2
"""Relative differences that bf16 explains. Labels one place off, or the pictures of other records, give more."""
PEAK_TOLERANCE, PEAK_ROUNDS = 0.1, 5
FIGURES = (
    "samples_s", "tokens_s", "peak_memory_mb", "peak_fraction", "seconds_per_step", "seconds_worst", "ratio", "waste",
)  # fmt: skip


def prepare(size: Size, batches: dict[str, int], folder: Path, micro_batch_tokens: int) -> dict[str, float]:
    """Write the weights all systems load; returns the useful FLOPs of each case's step of ``batches`` records."""
    from benchmarks.systems.transformers_system import write_llava
    from benchmarks.systems.vlit_system import packed_rows, tune
    from vlit.models.assemble import build_model
    from vlit.models.flops import UsefulFlops

    model = build_model(model_config(*write_parts(size, folder)), dtype=torch.bfloat16)
    write_llava(model, size, folder)
    flops: dict[str, float] = {}
    for name, num_records in batches.items():
        tune(model, CASES[name])
        useful = UsefulFlops(model)
        rows = packed_rows(make_records(CASES[name], size, num_records), size.image_tokens, micro_batch_tokens)
        flops[name] = sum(useful.of(row) for row in rows)
    return flops


def rows_of(workers: list[Worker], flops: float, peak: float) -> list[dict[str, Any]]:
    """A row a system; the figures of one that failed are null and its note says why."""
    job = workers[0].job
    records = make_records(CASES[job.case], SIZES[job.size], job.num_records)
    seconds = {w.job.system: statistics.median(s["seconds"] for s in w.steps[1:]) for w in workers if not w.failed}
    rows: list[dict[str, Any]] = []
    for worker in workers:
        system = worker.job.system
        row: dict[str, Any] = {
            "case": job.case,
            "system": system,
            **dict.fromkeys(FIGURES),
            "note": worker.failed or "",
        }
        if not worker.failed:
            own, reference = seconds[system], seconds.get(REFERENCE)
            ready = worker.ready
            row |= {
                "samples_s": job.num_records / own,
                "tokens_s": records.num_tokens / own,
                "peak_memory_mb": worker.steps[-1]["memory_mb"] - ready["imported_mb"],
                "peak_fraction": flops / own / peak,
                "seconds_per_step": own,
                "seconds_worst": max(step["seconds"] for step in worker.steps[1:]),
                "ratio": reference / own if reference else None,
                "waste": ready["padding"] / ready["positions"],
                "note": ready["note"],
            }
        rows.append({key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()})
    return rows


def check_agreement(workers: list[Worker]) -> dict[str, Any]:
    """Loss and gradient norm of every system's first step, and whether they are the same within bf16's noise."""
    first = {w.job.system: w.steps[0] for w in workers if w.steps}
    result: dict[str, Any] = {"agree": True}
    for what, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        values = {system: step[what] for system, step in first.items()}
        spread = max(values.values()) / min(values.values()) - 1 if values else 0.0
        result[what] = values
        result[f"{what}_spread"] = spread
        result["agree"] &= spread <= tolerance
    return result


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("case", "system", title=title)
    for heading in ("samples/s", "tokens/s", "memory MB", "% of peak", "s/step", "worst", "ratio", "waste %"):
        table.add_column(heading, justify="right", no_wrap=True)
    forms = ("{:,.2f}", "{:,.0f}", "{:,.0f}", "{:.1%}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1%}")
    for row in rows:
        cells = [
            "-" if row[figure] is None else form.format(row[figure])
            for figure, form in zip(FIGURES, forms, strict=True)
        ]
        table.add_row(row["case"], row["system"], *(cell.removesuffix("%") for cell in cells))
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--cases", default=",".join(CASES), help="by comma (default: all)")
    parser.add_argument("--systems", default="vlit,transformers,trl", help=f"by comma, of {', '.join(SYSTEMS)}")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each system, after one of warm-up")
    parser.add_argument("--batch", type=int, help="records of a step (default: by size and case)")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="most tokens of a packed row")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write machine, rows and checks to this file")
    parser.add_argument("--profile", type=Path, help="write vlit's profile of one more step of each case to this file")
    arguments = parser.parse_args()
    for name, known in (("cases", CASES), ("systems", SYSTEMS)):
        chosen = getattr(arguments, name).split(",")
        if unknown := [value for value in chosen if value not in known]:
            parser.error(f"--{name}: unknown {', '.join(unknown)}. Known: {', '.join(known)}.")
        setattr(arguments, name, chosen)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable CUDA GPU.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments.threads = arguments.threads or cores
    return arguments


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything the command reports."""
    from vlit.models.flops import matmul_peak

    size, device = SIZES[arguments.size], torch.device(arguments.device)
    batches = {case: arguments.batch or CASES[case].default_batch(arguments.size) for case in arguments.cases}

    def peak() -> float:
        return max(matmul_peak(device, torch.bfloat16) for _ in range(PEAK_ROUNDS))

    facts = timing.machine(device, (*timing.PACKAGES, "trl"))
    facts |= {"dtype": "bfloat16", "load_before": os.getloadavg(), "matmul_peak_before": peak()}
    done: dict[str, list[Worker]] = {}
    with tempfile.TemporaryDirectory() as name:
        with ProcessPoolExecutor(1, mp_context=fresh_processes(arguments.device)) as pool:
            flops = pool.submit(prepare, size, batches, Path(name), arguments.micro_batch_tokens).result()
        for case in arguments.cases:
            jobs = [
                Job(
                    system, case, arguments.size, batches[case], Path(name), arguments.threads, arguments.device,
                    arguments.micro_batch_tokens,
                    str(arguments.profile) if arguments.profile and system == "vlit" else None,
                )
                for system in arguments.systems
            ]  # fmt: skip
            done[case] = take_turns(jobs, arguments.steps, console)
    facts |= {"matmul_peak_after": peak(), "load_after": os.getloadavg()}
    low, high = sorted((facts["matmul_peak_before"], facts["matmul_peak_after"]))
    checks = {case: check_agreement(workers) for case, workers in done.items()}
    warnings = [f"{case}: the systems disagree, {check}" for case, check in checks.items() if not check["agree"]]
    failed = [w for workers in done.values() for w in workers if w.failed and not w.failed.endswith(NOT_INSTALLED)]
    warnings += [f"{worker.job.case}: {worker.job.system} failed: {worker.failed}" for worker in failed]
    if high > low * (1 + PEAK_TOLERANCE):
        warnings.append(
            f"the matmul peak was {facts['matmul_peak_before'] / 1e9:,.0f} GFLOP/s before and "
            f"{facts['matmul_peak_after'] / 1e9:,.0f} after: the machine was not quiet, measure again."
        )
    return {
        "machine": facts,
        "settings": {
            "size": arguments.size, **sizes_as_dict()[arguments.size], "batches": batches, "steps": arguments.steps,
            "micro_batch_tokens": arguments.micro_batch_tokens, "useful_flops": flops,
        },
        "rows": [row for case, workers in done.items() for row in rows_of(workers, flops[case], high)],
        "loss": checks,
        "failed": bool(failed),
        "warnings": warnings,
    }  # fmt: skip


def main() -> None:
    arguments = parse()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    torch.set_num_threads(arguments.threads)
    for file in (arguments.json, arguments.profile):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
    console = Console()
    console.width = max(console.width, 120)
    result = measure(arguments, console)
    facts = result["machine"]
    peak = max(facts["matmul_peak_before"], facts["matmul_peak_after"]) / 1e9
    console.print(table_of(result["rows"], f"{arguments.size}, bf16, matmul peak {peak:,.0f} GFLOP/s"))
    for note in dict.fromkeys(f"{row['system']}: {row['note']}" for row in result["rows"] if row["note"]):
        console.print(note, highlight=False)
    for case, check in result["loss"].items():
        console.print(
            f"{case}: first loss and gradient norm agree to {check['loss_spread']:.1e} and {check['grad_norm_spread']:.1e}"
            f"{'' if check['agree'] else ' - THEY DO NOT AGREE'}"
        )
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", style="bold red", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if result["failed"] or not all(check["agree"] for check in result["loss"].values()) else 0)


if __name__ == "__main__":
    main()
