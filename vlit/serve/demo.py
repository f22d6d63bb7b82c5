"""The demo: train both stages on the embedded world, evaluate held-out questions, write the report and a summary.

Each command is printed as it could be typed, and each resumes on its own, so the demo can be stopped at any moment and
started again.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlit.errors import VlitError
from vlit.train.metrics import format_seconds

SHORT = ["stages.align.max_steps=10", "stages.instruct.max_steps=10"]
SHORT_QUESTIONS = 48


class DemoError(VlitError):
    """A command of the demo failed; its own output says why."""


def tool(name: str) -> str:
    """A program of the environment this Python runs in, as a path relative to the working directory if possible."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        return name
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def run_command(command: Sequence[str], log: list[str]) -> None:
    """Print and run one command; DemoError when it fails, KeyboardInterrupt when it was interrupted."""
    shown = shlex.join(command)
    log.append(shown)
    print(f"\n$ {shown}", file=sys.stderr, flush=True)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    process = subprocess.Popen(list(command), env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it received the signal too and saves its state
        raise
    if code in (130, -2):
        raise KeyboardInterrupt
    if code:
        raise DemoError(f"the command above ended with exit code {code}: {shown}")


def training_command(config: str, overrides: Sequence[str]) -> list[str]:
    """How a configuration is trained on one machine."""
    return [tool("torchrun"), "scripts/train.py", "--config", config, *overrides]


def evaluation_command(
    checkpoint: Path, out: Path, *, rows: str, split: str, world: str, extra: Sequence[str] = (), template: str = ""
) -> list[str]:
    """How a checkpoint answers the embedded benchmark."""
    return [
        *(tool("python"), "scripts/eval.py", "--checkpoint", str(checkpoint), "--benchmark", "digits"),
        *("--rows", rows, "--out", str(out), *(("--template", template) if template else ())),
        *(f"split={split}", f"world={world}", *extra),
    ]


def run_demo(output_dir: Path, overrides: Sequence[str], *, short: bool = False) -> dict[str, Any]:
    """Run everything and return the summary; ``<output_dir>/summary.json`` and ``report.html`` are written last."""
    from vlit.config.load import load_config

    if not Path("configs/stage2.yaml").is_file():
        raise DemoError("configs/stage2.yaml is not here. Run the demo from the root of the repository.")
    started = time.perf_counter()
    settings = [f"output_dir={output_dir}", *(SHORT if short else []), *overrides]
    run = load_config("configs/stage2.yaml", settings)
    world = str(getattr(run.world, "root", "outputs/world/digits"))
    few = [f"max_questions={SHORT_QUESTIONS}"] if short else []
    commands: list[str] = []
    run_command(training_command("configs/stage2.yaml", settings), commands)
    trained, aligned = output_dir / "evaluations" / "instruct-test", output_dir / "evaluations" / "align-test"
    run_command(
        evaluation_command(
            output_dir / "instruct" / "model",
            trained,
            rows="image,blind,shuffled",
            split="test",
            world=world,
            extra=few,
        ),
        commands,
    )
    run_command(
        evaluation_command(
            output_dir / "align" / "model",
            aligned,
            rows="image",
            split="test",
            world=world,
            extra=few,
            template=json.dumps(run.data_for("instruct").template.model_dump(mode="json")),
        ),
        commands,
    )
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    stage1 = json.loads((aligned / "results.json").read_text(encoding="utf-8"))
    summary = {
        "accuracy": results["rows"]["image"]["accuracy"],
        "blind_accuracy": results["rows"]["blind"]["accuracy"],
        "shuffled_image_accuracy": results["rows"]["shuffled"]["accuracy"],
        "stage1_only_accuracy": stage1["accuracy"],
        "per_kind": results["per_kind"],
        "seconds": time.perf_counter() - started,
        "commands": commands,
    }
    aside = output_dir / ".summary.json.writing"
    aside.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    os.replace(aside, output_dir / "summary.json")
    run_command([tool("vlit"), "report", str(output_dir)], [])
    _print_summary(summary, output_dir)
    return summary


def _print_summary(summary: dict[str, Any], output_dir: Path) -> None:
    rows = {
        "held-out accuracy": summary["accuracy"],
        "without the image": summary["blind_accuracy"],
        "with another image": summary["shuffled_image_accuracy"],
        "after stage 1 only": summary["stage1_only_accuracy"],
    }
    print()
    for name, value in rows.items():
        print(f"{name:<20} {100 * value:5.1f} %")
    print(f"{'time':<20} {format_seconds(summary['seconds'])}")
    print(f"\nsummary  {output_dir / 'summary.json'}\nreport   {output_dir / 'report.html'}")
    print(
        f"talk     vlit chat --checkpoint {output_dir} --image outputs/world/digits/images/test/000001.png "
        '--prompt "Describe the image in detail."'
    )
