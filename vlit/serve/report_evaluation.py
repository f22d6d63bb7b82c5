"""Report sections about evaluations: accuracy per kind, the blind and shuffled rows, right and wrong answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from vlit.serve.charts import AccuracyBar, accuracy_chart
from vlit.serve.markup import Markup, duration, join, number, percent, table, tag
from vlit.serve.report_training import pictures
from vlit.serve.run_folder import Evaluation, Row, RunFolder, is_number

ROW_NAMES = {"image": "with the picture", "blind": "blind (no picture)", "shuffled": "another scene's picture"}
RIGHT_SHOWN = 8
WRONG_PER_KIND = 2
CARDS_OPEN = 12
"""More cards than this are folded away."""


def evaluation_sections(run: RunFolder) -> Markup:
    """A comparison of all evaluations when there are several, then one block for each; the headline first."""
    order = sorted(run.evaluations, key=lambda e: (e.results.get("accuracy") != run.summary.get("accuracy"), e.name))
    overview = _overview(order) if len(order) > 1 else None
    return join([overview, *(_evaluation(run, each, unfolded=each is order[0]) for each in order)])


def _share(value: Any) -> str:
    return percent(value) if is_number(value) else "–"


def _overview(evaluations: Iterable[Evaluation]) -> Markup:
    body = []
    for evaluation in evaluations:
        results = evaluation.results
        rows = results.get("rows") or {}
        body.append(
            (
                tag("a", evaluation.name, href=f"#evaluation-{evaluation.name}"),
                results.get("benchmark", ""),
                number(results.get("n", 0)),
                *(_share((rows.get(row) or {}).get("accuracy")) for row in ROW_NAMES),
            )
        )
    header = ("Evaluation", "Benchmark", "Questions", "With the picture", "Blind", "Another picture")
    return tag("div", table(header, body, numeric=(2, 3, 4, 5)), cls="card")


def _evaluation(run: RunFolder, evaluation: Evaluation, *, unfolded: bool) -> Markup:
    results = evaluation.results
    words = [f"benchmark {results.get('benchmark', '?')}", f"{number(results.get('n', 0))} questions"]
    if results.get("checkpoint"):
        words.append(f"checkpoint {results['checkpoint']}")
    if is_number(results.get("seconds")):
        words.append(duration(results["seconds"]))
    settings = results.get("settings") or {}
    words += [f"{key} {number(value)}" for key, value in settings.items() if not isinstance(value, (dict, list))]
    return tag(
        "div",
        tag("h3", evaluation.name),
        tag("p", " · ".join(words), cls="soft small meta"),
        tag("div", accuracy_chart(_bars(results)), _numbers(results), cls="card"),
        _answers(run, evaluation.predictions, unfolded=unfolded),
        id=f"evaluation-{evaluation.name}",
    )


def _bars(results: Row) -> list[AccuracyBar]:
    rows = results.get("rows") or {}
    blind, shuffled = rows.get("blind") or {}, rows.get("shuffled") or {}

    def bar(name: str, own: Row, without: Row, other: Row) -> AccuracyBar:
        return AccuracyBar(
            name,
            n=int(own["n"]),
            accuracy=own["accuracy"],
            low=own["ci_low"],
            high=own["ci_high"],
            chance=own.get("chance"),
            blind=without.get("accuracy"),
            shuffled=other.get("accuracy"),
        )

    bars = [bar("all", results, blind, shuffled)]
    for kind, own in (results.get("per_kind") or {}).items():
        without, other = (row.get("per_kind", {}).get(kind, {}) for row in (blind, shuffled))
        bars.append(bar(kind, own, without, other))
    return bars


def _numbers(results: Row) -> Markup:
    """The chart's numbers as a table, folded."""
    body = []
    for bar in _bars(results):
        shown = (
            _share(bar.accuracy),
            f"{_share(bar.low)} – {_share(bar.high)}",
            *map(_share, (bar.chance, bar.blind, bar.shuffled)),
        )
        body.append((bar.name, number(bar.n), *shown))
    header = ("Kind", "Questions", "Accuracy", "95 % interval", "Chance", "Blind", "Another picture")
    macro = results.get("macro_accuracy")
    under = tag("p", f"Mean over kinds {_share(macro)}.", cls="soft small") if is_number(macro) else None
    return tag("details", tag("summary", "Numbers"), table(header, body, numeric=range(1, 7)), under)


def _answers(run: RunFolder, predictions: list[Row], *, unfolded: bool) -> Markup:
    """Pictures with question, reference and answer: some right ones over all kinds, then wrong ones of every kind."""
    with_picture = [
        p for p in predictions if p.get("row", "image") == "image" and is_number(p.get("correct", False) + 0)
    ]
    right, wrong = chosen_answers(with_picture)
    blocks = []
    for title, rows in (("Right answers", right), ("Wrong answers", wrong)):
        if not rows:
            continue
        count = sum(is_right(p) == is_right(rows[0]) for p in with_picture)
        cards = [_card(run, row) for row in rows]
        blocks.append(tag("h3", title, tag("span", f" {len(rows)} of {count:,}", cls="soft")))
        blocks.append(tag("div", *cards[:CARDS_OPEN], cls="samples"))
        if len(cards) > CARDS_OPEN:
            more = tag("summary", f"{len(cards) - CARDS_OPEN} more")
            blocks.append(tag("details", more, tag("div", *cards[CARDS_OPEN:], cls="samples")))
    if not blocks or unfolded:
        return join(blocks)
    return tag("details", tag("summary", "Single answers"), *blocks)


def is_right(prediction: Row) -> bool:
    """An answer with at least half of the score counts as right."""
    return float(prediction.get("correct") or 0) >= 0.5


def chosen_answers(predictions: list[Row]) -> tuple[list[Row], list[Row]]:
    """A few right answers and up to two wrong ones of every kind; kinds take turns, pictures are repeated last."""
    right, wrong = ([p for p in predictions if is_right(p) is wanted] for wanted in (True, False))
    return _in_turn(right, per_kind=RIGHT_SHOWN)[:RIGHT_SHOWN], _in_turn(wrong, per_kind=WRONG_PER_KIND)


def _in_turn(predictions: list[Row], *, per_kind: int) -> list[Row]:
    waiting: dict[str, list[Row]] = {}
    for prediction in predictions:
        waiting.setdefault(str(prediction.get("kind", "")), []).append(prediction)
    seen: Counter[str] = Counter()
    chosen: list[Row] = []
    for _ in range(per_kind):
        for rows in waiting.values():
            if rows:
                pick = min(rows, key=lambda row: seen[str(row.get("image"))])
                rows.remove(pick)
                seen[str(pick.get("image"))] += 1
                chosen.append(pick)
    return chosen


def _card(run: RunFolder, row: Row) -> Markup:
    right = is_right(row)
    answer = row.get("answer", "")
    reference = " / ".join(dict.fromkeys(map(str, answer))) if isinstance(answer, list) else answer
    badge = tag("span", "✓ right" if right else "✗ wrong", cls="badge good" if right else "badge bad")
    parts = [
        tag("div", tag("span", row.get("kind", ""), cls="badge"), badge, cls="row"),
        pictures(run, row.get("image")),
        tag("div", tag("b", "Question"), row.get("question", ""), cls="qa"),
        tag("div", tag("b", "Answer"), row.get("prediction") or "(empty)", cls="qa"),
    ]
    if not right:
        parts.append(tag("div", tag("b", "Reference"), reference, cls="qa"))
    return tag("div", *parts, cls="sample")
