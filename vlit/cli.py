"""The command line: ``vlit train|eval|chat|preview|report|export|demo`` and ``scripts/*.py`` share this file.

Every command takes dotted overrides (``stages.instruct.max_steps=20``). An error a person can mend is printed on one line
and ends the command with exit code 2; ``vlit doctor`` ends with 1 when it finds bad records; an interrupted run ends
with 128 + signal.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vlit.errors import VlitError
from vlit.registry import load_plugins
from vlit.serve.synth_commands import add_data_commands
from vlit.serve.synth_options import add_engine_commands

Handler = Callable[[argparse.Namespace], Any]


def _train(args: argparse.Namespace) -> None:
    from vlit.serve.commands import train

    train(args.config, args.overrides, stage=args.stage)


def _eval(args: argparse.Namespace) -> None:
    from vlit.serve.evaluate import evaluate_checkpoint

    evaluate_checkpoint(
        args.checkpoint,
        args.benchmark,
        args.overrides,
        out=args.out,
        rows=args.rows.split(","),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        template=args.template,
        trust_remote_code=args.trust_remote_code,
    )


def _chat(args: argparse.Namespace) -> None:
    from vlit.serve.chat import chat

    chat(
        args.checkpoint,
        args.image,
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        trust_remote_code=args.trust_remote_code,
    )


def _preview(args: argparse.Namespace) -> None:
    from vlit.serve.commands import preview

    preview(args.config, args.overrides, stage=args.stage, samples=args.samples, out=args.out, terminal=not args.quiet)


def _preflight(args: argparse.Namespace) -> None:
    from vlit.serve.preflight import show_preflight

    show_preflight(args.config, args.overrides)


def _plan(args: argparse.Namespace) -> None:
    from vlit.plan.command import plan

    plan(
        args.config, args.overrides, gpus=args.gpus, share=args.share, parts=args.parts, stage=args.stage,
        records=args.records, tokens_per_record=args.tokens_per_record, images_per_record=args.images_per_record,
        as_json=args.json,
    )  # fmt: skip


def _doctor(args: argparse.Namespace) -> int:
    from vlit.serve.commands import doctor

    decode = args.images == "decode"
    healthy = doctor(args.config, args.overrides, stage=args.stage, out=args.out, workers=args.workers, decode=decode)
    return 0 if healthy else 1


def _convert(args: argparse.Namespace) -> None:
    from vlit.serve.convert import convert

    convert(
        args.path, args.out, source_format=args.source, to=args.to, options=args.overrides, images=args.images,
        quarantine=args.on_bad_record == "quarantine", budget=args.quarantine_budget, join=args.join,
    )  # fmt: skip


def _report(args: argparse.Namespace) -> None:
    from vlit.serve.report import write_report

    print(write_report(args.run_dir))


def _export(args: argparse.Namespace) -> None:
    from vlit.serve.commands import export

    export(args.checkpoint, args.to, args.out, dtype=args.dtype, trust_remote_code=args.trust_remote_code)


def _demo(args: argparse.Namespace) -> None:
    from vlit.serve.demo import run_demo

    run_demo(args.output_dir, args.overrides, short=args.short)


def _ablation(args: argparse.Namespace) -> None:
    from vlit.serve.ablation import run_ablation

    run_ablation(args.output_dir, args.overrides, only=args.only)


def _schema(args: argparse.Namespace) -> None:
    from vlit.serve.reference import write_reference

    for path in write_reference(args.out):
        print(path)


def _number(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    """An argparse type: finite numbers of ``kind`` from ``least`` on."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f'"{text}" is not a {what} of {least} or more')
        return value

    return read


_count, _average, _at_least_zero = _number(int, 1), _number(float, 1), _number(float, 0)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="vlit", description="Build models that follow visual instructions.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, handler: Handler, summary: str, *, overrides: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(handler=handler)
        sub.add_argument(
            "--plugin", action="append", default=[], metavar="MODULE", help="import a module that registers components"
        )
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the configuration")
        return sub

    def remote_code(sub: argparse.ArgumentParser) -> None:
        text = "run program code that comes with the checkpoint's base models"
        sub.add_argument("--trust-remote-code", action="store_true", help=text)

    sub = command("train", _train, "Train all stages of a configuration; finished stages are skipped.")
    sub.add_argument("--config", required=True, help="YAML file")
    sub.add_argument("--stage", help="train only this stage; its predecessors must be finished")

    sub = command("eval", _eval, "Evaluate a checkpoint; overrides set benchmark keys (split=test).")
    sub.add_argument("--checkpoint", type=Path, required=True, help="run folder, stage folder or model folder")
    sub.add_argument("--benchmark", required=True, help="registered benchmark, for example digits or qa")
    sub.add_argument("--out", type=Path, help="folder for predictions.jsonl and results.json")
    sub.add_argument("--rows", default="image", help="comma-separated: image, blind, shuffled (default: image)")
    sub.add_argument("--batch-size", type=_count, default=64)
    sub.add_argument("--template", help="ask with this template (name or YAML mapping), not the one of the last stage")
    sub.add_argument("--max-new-tokens", type=_count, default=64)
    remote_code(sub)

    sub = command("chat", _chat, "Talk to a checkpoint about an image.", overrides=False)
    sub.add_argument("--checkpoint", type=Path, required=True)
    sub.add_argument("--image", type=Path, action="append", default=[], help="image file; repeat for several")
    sub.add_argument("--prompt", help="ask once and exit instead of opening a conversation")
    sub.add_argument("--max-new-tokens", type=_count, default=256)
    sub.add_argument("--temperature", type=_at_least_zero, default=0.0, help="0 decodes greedily")
    remote_code(sub)

    sub = command("preview", _preview, "Show what training will see: pictures, tokens, which take loss, packing.")
    sub.add_argument("--config", required=True)
    sub.add_argument("--stage", help="default: every stage")
    sub.add_argument("--samples", type=_count, default=16)
    sub.add_argument("--out", type=Path, help="HTML file (default: <output_dir>/preview.html)")
    sub.add_argument("--quiet", action="store_true", help="write the HTML only")

    sub = command("preflight", _preflight, "Compare all processes of a run and try disk and network, without training.")
    sub.add_argument("--config", required=True, help="YAML file")

    sub = command("plan", _plan, "What a run needs: memory by component, time, checkpoints, and settings that fit.")
    sub.add_argument("--config", required=True, help="YAML file; weights and data need not be here")
    sub.add_argument("--gpus", help="for example 8xH100 (default: this machine)")
    sub.add_argument("--share", type=float, default=0.4, help="share of the peak that products reach (default: 0.4)")
    sub.add_argument("--parts", type=Path, help="folder that holds NAME/config.json for models that are not here")
    sub.add_argument("--stage", help="default: every stage")
    sub.add_argument("--records", type=_count, help="records of an epoch, instead of looking at the data")
    sub.add_argument("--tokens-per-record", type=_average, help="text and images, on average")
    sub.add_argument("--images-per-record", type=_at_least_zero)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("doctor", _doctor, "Find every bad record and image of a run's datasets before training.")
    sub.add_argument("--config", required=True)
    sub.add_argument("--stage", help="default: every stage")
    sub.add_argument("--out", type=Path, help="folder (default: <output_dir>/doctor, where training looks for it)")
    sub.add_argument("--workers", type=_count, help="processes (default: one a core)")
    sub.add_argument(
        "--images", choices=["decode", "header"], default="decode", help="decode every image, or read headers only"
    )

    sub = command("convert", _convert, "Write a dataset of any known format as LLaVA JSON or Parquet.", overrides=False)
    sub.add_argument("path", type=Path, help="dataset file or folder")
    sub.add_argument("out", type=Path, help=".jsonl or .json file, or .parquet file")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the format")
    sub.add_argument(
        "--from", dest="source", required=True, metavar="FORMAT", help="format of PATH, as in data sources"
    )
    sub.add_argument("--to", choices=["llava", "parquet"], default="llava", help="parquet holds the pictures as well")
    sub.add_argument("--images", type=Path, help="folder of the image paths (default: the dataset's own)")
    sub.add_argument(
        "--join", type=int, metavar="N", help="join records of one picture to conversations of at most N exchanges"
    )
    sub.add_argument("--on-bad-record", choices=["error", "quarantine"], default="error")
    sub.add_argument(
        "--quarantine-budget", type=_at_least_zero, default=0.01, help="most bad records, as a share (default: 0.01)"
    )

    sub = command("report", _report, "Write report.html of a run folder.", overrides=False)
    sub.add_argument("run_dir", type=Path)

    sub = command("export", _export, "Write a checkpoint others can load.", overrides=False)
    sub.add_argument("--checkpoint", type=Path, required=True)
    sub.add_argument("--to", choices=["hf"], default="hf")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    remote_code(sub)

    sub = command("demo", _demo, "Train, evaluate and report on the embedded world.")
    sub.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    sub.add_argument("--short", action="store_true", help="a few steps and questions: does everything run?")

    sub = command("demo-ablation", _ablation, "What each ingredient of the demo is worth, as a table from runs.")
    sub.add_argument("--output-dir", type=Path, default=Path("outputs/ablation"))
    sub.add_argument("--only", help="comma-separated names of runs")

    synth = commands.add_parser("synth", help="Make, measure and review instruction data.").add_subparsers(
        dest="synth_command", required=True, metavar="COMMAND"
    )

    def synth_command(name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
        sub = synth.add_parser(name, help=summary, description=summary)
        sub.set_defaults(handler=handler, plugin=[])
        return sub

    add_engine_commands(synth_command)
    add_data_commands(synth_command)

    sub = command("reference", _schema, "Write the configuration reference and JSON schema.", overrides=False)
    sub.add_argument("--out", type=Path, default=Path("docs"))
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command. ``key=value`` words may stand on both sides of options, which argparse alone refuses."""
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in late or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def main(argv: Sequence[str] | None = None, *, command: str | None = None) -> int:
    """Run one command. ``command`` is set by ``scripts/<command>.py``."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse([command, *words] if command else words)
    try:
        load_plugins(args.plugin)
        result = args.handler(args)
    except VlitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(error, file=sys.stderr)
        return int(code)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
