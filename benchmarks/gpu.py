"""All that is measured on one GPU, within a time budget:

``python -m benchmarks.gpu [--minutes 9] [--device cuda|cpu] [--quick] [--json FILE] [--markdown FILE]``

| part        | what runs, in a process of its own                                     | ends at |
|-------------|------------------------------------------------------------------------|---------|
| correctness | ``pytest -m gpu`` on the tests that need a GPU                         |    25 % |
| kernels     | :mod:`benchmarks.kernels`: attention and cross-entropy beside their peers |  62 % |
| steps       | :mod:`benchmarks.gpu_steps`: training steps of a model like LLaVA-1.5-7B |   97 % |

A kernel that breaks its process cannot break the next part. A part that finds too little of the budget left is not run, one
that outstays its share is stopped and keeps what it had measured; the result says so. JSON and Markdown are written after
every part. Beside the JSON lie those of the parts while they run, so nothing is lost when this process is killed.

With ``--device cpu`` the same parts run on the CPU, except the first; with ``--quick`` everything is tiny and says only
whether it runs. DeepSpeed, open_clip, datasets and wandb are not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_steps, kernels, timing

ROOT = Path(__file__).resolve().parent.parent
END = {"correctness": 0.25, "kernels": 0.62, "steps": 0.97}
"""Share of the budget that is used up at most when a part ends."""
LEAST_SECONDS = 15.0
SOFT_SHARE = 0.8
"""Share of its time after which a part begins nothing new, so that it ends by itself."""
TAIL_LINES = 40


def gpu_tests() -> list[str]:
    """Test files that hold tests for a GPU."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{file.name}" for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def arguments_of(part: str, arguments: argparse.Namespace, seconds: float, result: Path) -> list[str]:
    """What Python is to run for a part."""
    if part == "correctness":
        return ["-m", "pytest", "-m", "gpu", "-q", "-rsf", "-p", "no:cacheprovider", *gpu_tests()]
    shared = ["--device", arguments.device, "--seconds", f"{SOFT_SHARE * seconds:.0f}", "--json", str(result)]
    if arguments.threads:
        shared += ["--threads", str(arguments.threads)]
    if part == "kernels":
        return ["-m", "benchmarks.kernels", *shared, *["--quick"] * arguments.quick]
    size = (
        ["--size", "tiny", "--steps", "1", "--micro-batch-tokens", "256"]
        if arguments.quick
        else ["--size", arguments.size]
    )
    return ["-m", "benchmarks.gpu_steps", *shared, *size]


def run_part(part: str, arguments: argparse.Namespace, seconds: float, result: Path) -> dict[str, Any]:
    """Run a part for at most ``seconds``: its status, its command, what it wrote and its last words."""
    if part == "correctness" and arguments.device != "cuda":
        return {"status": "not run: needs CUDA"}
    if seconds < LEAST_SECONDS:
        return {"status": f"not run: {max(seconds, 0):.0f} s of its share of the budget were left"}
    wanted = arguments_of(part, arguments, seconds, result)
    environment = os.environ | {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # steps that nearly fill the memory must not fail by fragments
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    result.unlink(missing_ok=True)
    log = result.with_suffix(".log")
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *wanted], cwd=ROOT, env=environment, stderr=file, process_group=0,
            stdout=file if part == "correctness" else subprocess.DEVNULL,  # the tables of the others are made here again
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s, its share of the budget"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it started: compilers would disturb the next part
            process.wait()
    command = f"python {' '.join(wanted)}"
    found: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - start, "command": command}
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8")) | found
    if lines := log.read_text(encoding="utf-8", errors="replace").splitlines():
        found["tail"] = lines[-TAIL_LINES:]
    log.unlink()
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result for people."""
    facts = result["machine"]
    lines = [
        f"# Measured on {facts.get('gpu') or facts['cpu']}", "",
        f"Command: `{result['command']}`, {result['seconds']:.0f} s of {result['budget_seconds']:.0f} s.", "",
        ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None) + ".",
    ]  # fmt: skip
    for part, found in result["parts"].items():
        lines += ["", f"## {part}", "", f"{found['status']}."]
        if "command" in found:
            lines[-1] += f" `{found['command']}`, {found['seconds']:.0f} s"
        if found.get("matmul_tflops"):
            lines += ["", f"bf16 matmul peak of this run: {max(found['matmul_tflops']):,.3f} TFLOP/s."]
        if found.get("rows"):
            lines += ["", kernels.table_of(found["rows"]) if part == "kernels" else gpu_steps.table_of(found["rows"])]
        if "tail" in found:
            lines += ["", "```text", *found["tail"], "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    start = time.perf_counter()
    parser = timing.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="budget for everything")
    parser.add_argument("--size", choices=gpu_steps.SIZES, default="7b", help="model of the steps")
    parser.add_argument("--quick", action="store_true", help="does everything run? The figures mean little")
    parser.add_argument("--markdown", type=Path, help="write tables to this file")
    arguments = parser.parse_args()
    budget = 60 * arguments.minutes
    result: dict[str, Any] = {
        "command": timing.command("benchmarks.gpu"), "budget_seconds": budget, "seconds": 0.0,
        "machine": timing.machine(torch.device(arguments.device)), "parts": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for part, end in END.items():
            beside = (arguments.json or Path(folder) / "gpu.json").resolve()
            own = beside.with_name(f"{beside.stem}-{part}.json")
            own.parent.mkdir(parents=True, exist_ok=True)
            left = end * budget - (time.perf_counter() - start)
            result["parts"][part] = run_part(part, arguments, left, own)
            result["seconds"] = time.perf_counter() - start
            print(f"{result['seconds']:4.0f} s: {part} {result['parts'][part]['status']}", file=sys.stderr, flush=True)
            timing.write_json(arguments.json, result)
            if arguments.markdown:
                arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
                arguments.markdown.write_text(markdown(result), encoding="utf-8")
            own.unlink(missing_ok=True)  # its content stands in the result now
    print(markdown(result))


if __name__ == "__main__":
    main()
