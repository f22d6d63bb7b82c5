"""``vlit synth run|estimate|status|world``: the data engine from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vlit.errors import ConfigError, DataError
from vlit.synth.engine.estimate import estimate
from vlit.synth.engine.pipeline import build_teachers, run
from vlit.synth.engine.report import Report
from vlit.synth.engine.settings import SynthConfig
from vlit.synth.engine.status import read_status


def synth_run(settings: SynthConfig, *, yes: bool) -> bool:
    """Estimate, ask where money or other people's machines are involved, run, report. False: some items are unanswered.

    Raises:
        DataError: the run is complete and made no record.
    """
    confirm({"": settings}, yes=yes)
    report = run(settings)
    show_report(report, Path(settings.out))
    if report.records == 0:
        raise DataError(why_empty(settings, report))
    return report.unanswered == 0


def why_empty(settings: SynthConfig, report: Report) -> str:
    """What a run that made no record says."""
    from_annotations = build_teachers(settings)["vision"].known_domains() is not None
    hint = (
        " The embedded teacher answers from annotations: give --annotations, or a teacher that sees (openai, local)."
        if from_annotations and not settings.annotations and not settings.records
        else f" All that was left out: {Path(settings.out) / 'rejected.jsonl'}."
    )
    return f"{settings.out}: no record was made; {report.emptied}.{hint}"


def confirm(runs: dict[str, SynthConfig], *, yes: bool) -> None:
    """Show what runs (by name) will cost, and ask, where money or other people's machines are involved.

    Raises:
        ConfigError: the answer is no, or nobody is there to answer.
    """
    remote = {
        name: settings
        for name, settings in runs.items()
        if any(teacher.is_remote for teacher in build_teachers(settings).values())
    }
    if not remote:
        return
    for name, settings in remote.items():
        print(f"-- {name}\n" * bool(name) + estimate(settings).text(), file=sys.stderr)
    budget = next(iter(remote.values())).budget_usd
    if budget is not None:
        print(f"budget    ${budget:,.2f} (the run stops before it could be exceeded)", file=sys.stderr)
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            "vlit synth: this run sends requests to another machine. Add --yes to begin without a question."
        )
    print("begin? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("vlit synth: not begun.")


def show_report(report: Report, out: Path) -> None:
    """What every stage did, what it cost, and where the dataset lies."""
    for stage in report.stages:
        why = ", ".join(f"{name} {count}" for name, count in stage.rejected.most_common())
        parts = [f"{stage.items_in} in", f"{stage.items_out} out"]
        parts += [f"{stage.reused} reused"] if stage.reused else []
        parts += [f"rejected: {why}"] if why else []
        parts += [f"{stage.unanswered} unanswered"] if stage.unanswered else []
        print(f"{stage.name:<10} {', '.join(parts)}", file=sys.stderr)
    totals = report.to_json()
    if totals["tokens_in"] or totals["cost_usd"]:
        print(
            f"cost       ${totals['cost_usd']:.4f} for {totals['replies']} replies, {totals['tokens_in']} tokens in, "
            f"{totals['tokens_out']} out; {totals['failed_requests']} failed requests",
            file=sys.stderr,
        )
    if report.records is None:
        print(f"not complete: {report.unanswered} requests unanswered, most often: {report.failure}", file=sys.stderr)
        print("             mend what can be mended, then run the same command again", file=sys.stderr)
    else:
        print(f"dataset    {out / 'dataset.jsonl'}  ({report.records} records)", file=sys.stderr)


def synth_estimate(settings: SynthConfig, *, as_json: bool) -> None:
    """What a run would cost. Sends nothing."""
    found = estimate(settings)
    print(json.dumps(found.to_json(), indent=2) if as_json else found.text())


def synth_status(out: Path, *, as_json: bool) -> None:
    """How far a run is; it may be running."""
    if not (out / "run.json").is_file():
        below = ", ".join(str(path.parent) for path in sorted(out.glob("*/run.json")))
        remedy = f"This is a build of several; give one of {below}." if below else "Give the folder of --out."
        raise DataError(f"{out}: no run of vlit synth here (no run.json). {remedy}")
    status: dict[str, Any] = read_status(out)
    if as_json:
        print(json.dumps(status, indent=2))
        return
    for stage in status["stages"]:
        why = ", ".join(f"{name} {count}" for name, count in stage["rejected"].items())
        print(f"{stage['stage']:<12} {stage['done']} done" + (f", rejected: {why}" if why else ""))
    print(
        f"requests     {status['replies']} replies, {status['failed_requests']} failed, {status['open']} without an outcome"
    )
    print(f"cost         ${status['cost_usd']:.4f}, at most ${status['possibly_spent_usd']:.4f}")
    records = status["records"]
    print(
        "dataset      not complete" if records is None else f"dataset      {out / 'dataset.jsonl'}  ({records} records)"
    )


def synth_world(root: Path, *, pictures: int, seed: int) -> None:
    """Build the embedded world: pictures with COCO annotations to try every recipe on."""
    from vlit.synth.digits.world import ensure_world

    few = max(1, pictures // 10)
    ensure_world(root, seed=seed, train_images=pictures, validation_images=few, test_images=few, questions_per_kind=1)
    print(f"annotations  {root / 'annotations'}\nimages       {root / 'images'}", file=sys.stderr)
