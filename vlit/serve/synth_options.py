"""``vlit synth run|estimate|build|status|world``: their options, and the calls behind them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_BUILD = Path("configs/synth/world.yaml")
AddCommand = Callable[[str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]


def add_engine_commands(command: AddCommand) -> None:
    """Add the commands that make instruction data."""
    for name, handler, summary in (
        ("run", _run, "Make instruction data; the same command continues a run that was stopped."),
        ("estimate", _estimate, "What a run would ask for and cost. Sends nothing."),
    ):
        sub = command(name, handler, summary)
        sub.add_argument("--config", type=Path, help="YAML file with the same keys; options and overrides go before it")
        sub.add_argument(
            "--recipe",
            help="adapt, llava, minigpt4, mminstruct, stablellava, otter, expand, judge, or a registered one",
        )
        sub.add_argument(
            "--teacher", help="annotations (default: embedded, offline), openai, local, or a registered one"
        )
        sub.add_argument("--vision-teacher", help="who looks at pictures (default: the teacher)")
        sub.add_argument(
            "--annotations", nargs="+", action="extend", default=[], metavar="COCO.json", help="files or folders"
        )
        sub.add_argument("--images", help="folder that image paths are relative to")
        sub.add_argument(
            "--records", nargs="+", action="extend", default=[], metavar="JSONL", help="finished records (otter)"
        )
        sub.add_argument("--out", help="folder of the run")
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example teacher.model=NAME budget_usd=5"
        )
        if name == "run":
            sub.add_argument("--yes", action="store_true", help="begin without a question after the estimate")
        else:
            sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "build", _build, "Recipes, one dataset, its card, filters, and the review page, by one configuration."
    )
    sub.add_argument("--config", type=Path, default=DEFAULT_BUILD, help=f"YAML file (default: {DEFAULT_BUILD})")
    sub.add_argument("--yes", action="store_true", help="begin without a question after the estimate")
    sub.add_argument("--no-review", action="store_true", help="do not serve the review page afterwards")
    sub.add_argument("--port", type=int, default=8765, help="of the review page; 0 takes a free one (default: 8765)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example out=FOLDER max_items=100")

    sub = command("status", _status, "How far a run is, and what it has cost.")
    sub.add_argument("out", type=Path, help="folder of the run")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("world", _world, "Build the embedded pictures with COCO annotations, to try recipes on.")
    sub.add_argument("--out", type=Path, default=Path("outputs/world/digits"))
    sub.add_argument("--pictures", type=int, default=1000, help="training pictures (default: 1000)")
    sub.add_argument("--seed", type=int, default=0)


def _settings(args: argparse.Namespace) -> Any:
    from vlit.synth.engine.settings import read_settings

    names = ("recipe", "teacher", "vision_teacher", "annotations", "images", "records", "out")
    words = [*args.overrides]
    for name in ("annotations", "records"):  # a list option swallows overrides that stand behind it
        words += [word for word in getattr(args, name) if _is_override(word)]
    given = {name: getattr(args, name) for name in names}
    given |= {n: [w for w in given[n] if not _is_override(w)] for n in ("annotations", "records")}
    return read_settings(args.config, given, words)


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _run(args: argparse.Namespace) -> int:
    from vlit.serve.synth import synth_run

    return 0 if synth_run(_settings(args), yes=args.yes) else 1


def _estimate(args: argparse.Namespace) -> None:
    from vlit.serve.synth import synth_estimate

    synth_estimate(_settings(args), as_json=args.json)


def _build(args: argparse.Namespace) -> int:
    from vlit.serve.build import synth_build
    from vlit.serve.review.command import open_server, review
    from vlit.synth.engine.settings import read_build

    settings = read_build(args.config, args.overrides)
    kept = synth_build(settings, yes=args.yes)
    if kept is None:
        return 1
    if not args.no_review:
        review(open_server(kept, images=Path(settings.images), port=args.port))
    return 0


def _status(args: argparse.Namespace) -> None:
    from vlit.serve.synth import synth_status

    synth_status(args.out, as_json=args.json)


def _world(args: argparse.Namespace) -> None:
    from vlit.serve.synth import synth_world

    synth_world(args.out, pictures=args.pictures, seed=args.seed)
