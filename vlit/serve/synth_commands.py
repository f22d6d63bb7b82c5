"""``vlit synth quality`` and ``vlit synth review``: their options, and the calls behind them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlit.errors import ConfigError

AddCommand = Callable[[str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]


def add_data_commands(command: AddCommand) -> None:
    """Add the commands that look at a finished dataset."""
    sub = command("quality", _quality, "Measure a dataset: card, filters, selection of a subset.")
    sub.add_argument("dataset", type=Path, nargs="?", help="canonical JSONL (vlit convert writes it)")
    sub.add_argument("--images", type=Path, help="folder that image paths are relative to (default: the dataset's)")
    sub.add_argument(
        "--annotations", action="append", default=[], metavar="[FOLDER/=]COCO.json",
        help="what the pictures show: COCO instances; FOLDER/ stands before file names in image paths; may be repeated",
    )  # fmt: skip
    sub.add_argument("--eval-texts", type=Path, action="append", default=[], help="evaluation file (JSONL or JSON)")
    sub.add_argument("--eval-images", type=Path, action="append", default=[], help="folder of evaluation pictures")
    sub.add_argument("--model", type=Path, help="trained vlit model: loss of the answers with and without the picture")
    sub.add_argument("--clip", help="transformers CLIP folder: agreement of picture and text, spread of embeddings")
    sub.add_argument("--out", type=Path, help="folder of the card (default: <dataset>.quality)")
    sub.add_argument("--keep", action="append", default=[], metavar="FILTER", help='"correctness>=0.5" or a name')
    sub.add_argument("--select", type=int, metavar="N", help="keep N records by quality and diversity")
    sub.add_argument("--write", type=Path, help="JSONL of what is kept (default: kept.jsonl in the card's folder)")
    sub.add_argument("--workers", type=int, help="processes (default: one a core)")
    sub.add_argument("--list-filters", action="store_true", help="print named filters and metrics, and end")

    sub = command("review", _review, "Accept, edit or reject records on a local web page.")
    sub.add_argument("dataset", type=Path, help="canonical JSONL")
    sub.add_argument("--images", type=Path, help="folder that image paths are relative to (default: the dataset's)")
    sub.add_argument("--scores", type=Path, help="metrics.parquet of vlit synth quality (default: found beside)")
    sub.add_argument("--log", type=Path, help="decisions (default: <dataset>.reviews.jsonl)")
    sub.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: 8765)")
    sub.add_argument("--host", help="address to listen on besides loopback's; needs --token or VLIT_REVIEW_TOKEN")
    sub.add_argument("--token", help="secret of at least 16 characters (default: a new random one)")
    sub.add_argument("--export", type=Path, help="write the accepted records to this file and end")


def _quality(args: argparse.Namespace) -> None:
    from vlit.serve.quality import list_filters, measure_quality

    if args.list_filters:
        print(list_filters())
        return
    if args.dataset is None:
        raise ConfigError("vlit synth quality: which dataset? Give a canonical JSONL file.")
    measure_quality(
        args.dataset, images=args.images, annotations=args.annotations, eval_texts=args.eval_texts,
        eval_images=args.eval_images, out=args.out, keep=args.keep, select=args.select, write=args.write,
        workers=args.workers, model=args.model, clip=args.clip,
    )  # fmt: skip


def _review(args: argparse.Namespace) -> None:
    from vlit.serve.review.command import export_reviews, open_server, review

    if args.export is not None:
        export_reviews(args.dataset, out=args.export, log=args.log)
        return
    server = open_server(
        args.dataset, images=args.images, scores=args.scores, log=args.log, port=args.port, host=args.host,
        token=args.token,
    )  # fmt: skip
    review(server)
