"""``vlit eval``: a benchmark asked of a checkpoint, on one process or on all that torchrun starts.

Every rank is a *replica*: it loads its own copy of the model, answers its share of the questions and writes its own file;
the first one merges and scores. So the whole model must fit on every rank.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlit.config.load import apply_override
from vlit.errors import ConfigError, EvaluationError, VlitError
from vlit.registry import BENCHMARKS


def evaluate_checkpoint(
    checkpoint: Path,
    benchmark: str,
    overrides: Sequence[str],
    *,
    out: Path | None = None,
    rows: Sequence[str] = ("image",),
    batch_size: int = 64,
    max_new_tokens: int = 64,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Answer a benchmark greedily and score it; resumes where an interrupted evaluation stopped.

    Returns the results on the first rank, ``{}`` on the others.
    """
    from vlit.config.schema import RuntimeConfig
    from vlit.eval.answers import OtherRankFailedError
    from vlit.train.distributed import start_ranks

    ranks = start_ranks(RuntimeConfig())

    def barrier() -> None:
        try:
            ranks.barrier()
        except RuntimeError as error:  # a rank has ended: it says why, or its launcher does
            raise OtherRankFailedError(f"rank {ranks.rank}: another rank has ended. See its message.") from error

    try:
        return _evaluate(
            checkpoint, benchmark, overrides, out=out, rows=rows, batch_size=batch_size, template=template,
            max_new_tokens=max_new_tokens, trust_remote_code=trust_remote_code, rank=ranks.rank,
            world_size=ranks.world_size, barrier=barrier,
        )  # fmt: skip
    except OtherRankFailedError:
        raise SystemExit(2) from None  # one message is enough
    except VlitError as error:
        if ranks.world_size == 1:
            raise
        raise EvaluationError(f"rank {ranks.rank} of {ranks.world_size}: {error}") from error
    except Exception as error:
        if ranks.world_size > 1:
            error.add_note(f"on rank {ranks.rank} of {ranks.world_size}; it ends the others.")
        raise


def _evaluate(
    checkpoint: Path,
    benchmark: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    rows: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    template: str | None,
    trust_remote_code: bool,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
) -> dict[str, Any]:
    from rich.console import Console
    from tqdm import tqdm

    from vlit.answer import ask
    from vlit.eval.run import evaluate
    from vlit.serve.commands import load_answerer, open_checkpoint

    if rank > 0:
        barrier()  # what is wrong for all is said once, by the first rank
    built = build_benchmark(benchmark, overrides)
    built.load()  # a missing question file is an error before the model is loaded
    options: Any = {"template": template, "trust_remote_code": trust_remote_code}
    folder, manifest = open_checkpoint(checkpoint, **options)
    if rank == 0:
        barrier()
    stage = str(manifest["info"].get("stage", folder.parent.name))
    out = out or folder.parent.parent / "evaluations" / f"{stage}-{built.name}"
    weights = hashlib.sha256(repr(sorted(manifest["files"].items())).encode()).hexdigest()
    bar = tqdm(desc=built.name, unit="question", disable=rank > 0 or not sys.stderr.isatty(), leave=False)
    loaded: list[Any] = []

    def answer(questions: list[Any]) -> list[str]:
        if not loaded:  # a rank without open questions loads no model
            loaded.append(load_answerer(checkpoint, max_new_tokens=max_new_tokens, **options)[0])
        made = loaded[0].answers([ask(q.turn_text(), q.images) for q in questions], batch_size=batch_size)
        return [answer.text for answer in made]

    def advance(answered: int, total: int) -> None:
        bar.total, bar.n = total, answered
        bar.refresh()

    results = evaluate(
        answer,
        built,
        out,
        rows=rows,
        batch_size=batch_size,
        checkpoint=str(folder),
        settings={
            "max_new_tokens": max_new_tokens,
            "weights_sha256": weights,
            "template": manifest["data"]["template"],
        },
        progress=advance,
        rank=rank,
        world_size=world_size,
        barrier=barrier,
    )
    bar.close()
    if rank == 0:
        Console(stderr=True, width=None if sys.stderr.isatty() else 110).print(results_table(results))
        print(f"results  {out / 'results.json'}", file=sys.stderr)
    return results


def build_benchmark(name: str, overrides: Sequence[str]) -> Any:
    """The registered benchmark ``name`` with ``key=value`` settings; ConfigError names the key that is wrong."""
    raw: dict[str, Any] = {"type": name}
    for override in overrides:
        apply_override(raw, override)
    try:
        return BENCHMARKS.get(name).model_validate(raw).build()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--benchmark {name}: {where}{first['msg'] if not where else ': ' + first['msg']}") from error


def results_table(results: dict[str, Any]) -> Any:
    """Accuracy per kind and row with the 95 % interval of the first row."""
    from rich.table import Table

    table = Table(title=f"{results['benchmark']}  ({results['checkpoint']})", title_justify="left")
    for column in ("kind", "n", *results["rows"], "95 % interval", "chance"):
        table.add_column(column, justify="left" if column == "kind" else "right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def interval(row: dict[str, Any]) -> str:
        return f"{percent(row['ci_low'])}-{percent(row['ci_high'])}"

    for kind, first in results["per_kind"].items():
        cells = [percent(row["per_kind"][kind]["accuracy"]) for row in results["rows"].values()]
        table.add_row(kind, str(first["n"]), *cells, interval(first), percent(first.get("chance")))
    totals = [percent(row["accuracy"]) for row in results["rows"].values()]
    table.add_section()
    table.add_row("all", str(results["n"]), *totals, interval(results), percent(results.get("chance")))
    return table
