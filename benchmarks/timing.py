"""What measurements share: options, facts of the machine, medians of systems that take turns, errors, tables and JSON."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlit.models.flops import matmul_peak

Call = Callable[[], object]
Clock = Callable[[Call, int, torch.device], float]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "numpy")
LAUNCH_SECONDS = 5e-3
"""Longest head start that :func:`device_seconds` gives the host."""


class Unsuited(Exception):
    """A system does not compute this case; the text says why."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the fastest of ``rounds`` turns of ``calls`` calls each."""

    seconds: float
    fastest: float
    rounds: int
    calls: int


def machine(device: torch.device, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    for name in packages:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    return facts


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every command has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    found.add_argument("--device", type=_device, default=default, metavar="cpu|cuda", help="default here: %(default)s")
    found.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    found.add_argument("--json", type=Path, help="write everything to this file")
    return found


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this machine has no usable CUDA GPU")
    return text


def command(module: str) -> str:
    """The command line of this process, as one would type it."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason(error: BaseException) -> str:
    """One line that says why something did not run."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory"
    if isinstance(error, Unsuited):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def wall_seconds(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one call by the clock on the wall, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def device_seconds(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one call on a GPU: it waits first, so that short kernels are queued before the clock starts, as they are
    in the middle of a training step. On a CPU the same as :func:`wall_seconds`.
    """
    if device.type != "cuda":
        return wall_seconds(call, calls, device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronise(device)
    torch.cuda._sleep(int(LAUNCH_SECONDS * 2e9))  # in clock cycles, about 2 a nanosecond
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    synchronise(device)
    return begin.elapsed_time(end) / 1e3 / calls


def interleaved(
    systems: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    round_seconds: float = 0.0,
    clock: Clock = wall_seconds,
    deadline: float = math.inf,
) -> dict[str, Timing | str]:
    """Let the systems take turns, starting with another one each round; a system that fails gives the reason instead.

    Args:
        rounds: turns of each system, after one call that warms up. The deadline may make it fewer, never less than one.
        round_seconds: a turn is as many calls as fit; 0: one call.
        deadline: value of ``time.perf_counter`` after which no further round begins.
    """
    failed: dict[str, Timing | str] = {}
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in systems}

    def attempt(name: str, count: int) -> float:
        try:
            return clock(systems[name], count, device)
        except Exception as error:
            failed[name] = reason(error)
        gc.collect()  # here the error is gone, and with it the frames that hold its tensors
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return math.nan

    for name in systems:
        attempt(name, 1)
        if name not in failed:
            once = attempt(name, 1) if round_seconds else 0.0
            calls[name] = max(1, math.ceil(round_seconds / max(once, 1e-6))) if round_seconds and once == once else 1
    order = [name for name in systems if name not in failed]
    for number in range(rounds):
        if number and time.perf_counter() > deadline:
            break
        for name in order:
            if name not in failed and (found := attempt(name, calls[name])) == found:
                seconds[name].append(found)
        order = [*order[1:], *order[:1]]
    return {
        name: failed[name]
        if name in failed
        else Timing(statistics.median(seconds[name]), min(seconds[name]), len(seconds[name]), calls[name])
        for name in systems
    }


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Distance to the exact tensor as a share of its norm, for the worst of the tensors."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, exact, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)


def note_peak(result: dict[str, Any], device: torch.device) -> None:
    """Measure the bf16 matmul peak once more and set ``share`` of every row to ``tflops`` / the largest peak so far."""
    result["matmul_tflops"].append(matmul_peak(device, torch.bfloat16) / 1e12)
    for row in result["rows"]:
        if row.get("tflops") is not None:
            row["share"] = row["tflops"] / max(result["matmul_tflops"])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    """Markdown, aligned so that it reads well in a terminal too.

    Args:
        columns: heading, key and format of each column; a missing value or None becomes a dash. A column that would
            hold dashes only is left out.
    """
    shown = [column for column in columns if any(row.get(column[1]) not in (None, "") for row in rows)]
    cells = [[heading for heading, _, _ in shown]]
    for row in rows:
        values = [row.get(key) for _, key, _ in shown]
        cells.append(["–" if v in (None, "") else f"{v:{form}}" for v, (_, _, form) in zip(values, shown, strict=True)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(shown))]
    right = [bool(form) for _, _, form in shown]
    lines = [
        "| "
        + " | ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_json(path: Path | None, data: Any) -> None:
    """Write ``data`` aside and rename, so that a reader never meets half a file; nothing when ``path`` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
