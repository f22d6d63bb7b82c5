"""The quality card as a self-contained page: figures by axis, charts, and records that show what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlit.data.images import resolve_image
from vlit.data.json_stream import iter_json_records
from vlit.data.record import Record
from vlit.errors import DataError
from vlit.serve.markup import Markup, duration, number, page, percent, picture, short, table, tag
from vlit.serve.quality_charts import bars, histogram
from vlit.synth.quality.filters import MEANING
from vlit.synth.quality.scan import Measured
from vlit.synth.quality.text import read_record

EXAMPLES = 4
TITLES = {
    "wrong_exists": "Things that are not there", "wrong_count": "Wrong counts", "wrong_colour": "Wrong colours",
    "wrong_place": "Wrong places", "wrong_box": "Boxes beside their things", "wrong_yes_no": "Wrong judgements",
    "leaks": "Answers given away by the question", "duplicate": "Repeats an earlier record",
    "eval_text": "Text of an evaluation set", "eval_image": "Picture of an evaluation set",
}  # fmt: skip


def build_page(card: dict[str, Any], found: Measured, *, root: Path | None) -> str:
    """The whole page; ``root`` is the image folder, None: examples without pictures."""
    examples = _read_examples(found, _rows_to_show(found))
    best = np.argsort(-np.nan_to_num(found.numbers["quality"]), kind="stable")[:EXAMPLES].tolist()
    return page(
        f"{card['dataset']} · vlit synth quality",
        tag("h1", card["dataset"]),
        tag("p", _verdict(card), cls="soft"),
        tag("div", *(_tile(*tile) for tile in _tiles(card)), cls="tiles"),
        tag("section", tag("h2", "Correctness"), _correctness(card["correctness"])),
        tag("section", tag("h2", "Diversity"), _diversity(card["diversity"])),
        tag("section", tag("h2", "Complexity"), _complexity(card["complexity"])),
        tag("section", tag("h2", "By trained models"), _models(card["models"])) if card["models"] else None,
        tag("section", tag("h2", "Distributions"), _histograms(card)),
        tag("section", tag("h2", "Provenance"), _provenance(card["provenance"])),
        *(_faults(name, card, found, examples, root) for name, count in card["faults"].items() if count),
        tag("section", tag("h2", "Highest quality"), _cards(best, found, examples, root, "quality")),
        _kept(card),
    )


def _verdict(card: dict[str, Any]) -> str:
    seconds = duration(sum(card["seconds"].values()))
    peak = card["peak_memory_bytes"]
    text = f"{card['records']:,} records, {card['bad_records']:,} unreadable; measured in {seconds}"
    return text + (f" with {peak / 1e6:,.0f} MB of memory a process at most." if peak else ".")


def _tile(label: str, value: str, under: str) -> Markup:
    return tag(
        "div",
        tag("div", label, cls="label"),
        tag("div", value, cls="value"),
        tag("div", under, cls="under"),
        cls="tile",
    )


def _tiles(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    correct, varied, hard = card["correctness"], card["diversity"], card["complexity"]
    right = percent(correct["mean"]) if correct["mean"] is not None else "–"
    known = f"{correct['records_with_claims']:,} records with claims" if correct["measured"] else "no annotations given"
    d2 = varied["distinct"]["distinct_2"]
    found = [
        f"{count:,} {name.removeprefix('eval_')}" for name, count in card["contamination"].items() if count is not None
    ]
    return [
        ("correctness", right, known),
        ("diversity, distinct-2", number(d2) if d2 is not None else "–", f"{varied['duplicates']:,} duplicates"),
        (
            "complexity",
            number(hard["complexity"].get("mean", 0.0)),
            f"{number(hard['turns'].get('mean', 0.0))} turns a record",
        ),
        ("visual dependence", percent(card["visual_dependence"]["mean"]), card["visual_dependence"]["guesser"]),
        ("evaluation data", " · ".join(found) or "–", "records that hold some" if found else "no evaluation set given"),
    ]


def _correctness(card: dict[str, Any]) -> Markup:
    rows = [
        (check, number(count["all"]), number(count["wrong"]), percent(1 - count["wrong"] / count["all"]))
        for check, count in card["claims"].items()
    ]
    judged = card["judged"]
    second = (
        f" A second teacher agrees with {percent(judged['mean'])} of the answers of {judged['records']:,} records."
        if judged["records"]
        else ""
    )
    yes = percent(card["yes_share"]) if card["yes_share"] is not None else "–"
    return tag(
        "div",
        table(("claims", "compared", "wrong", "agree"), rows, numeric=(1, 2, 3)) if rows else None,
        tag(
            "p",
            f"Yes among {card['judgements']:,} judgements: {yes}. Records with a leaking answer: {card['leaking_records']:,}."
            + second,
        ),
        cls="card",
    )


def _diversity(card: dict[str, Any]) -> Markup:
    roots = {f"{verb} · {noun}": n for verb, nouns in card["roots"].items() for noun, n in nouns.items()}
    groups = [
        bars(name.replace("_", " "), values, colour=4) for name, values in card["groups"].items() if len(values) > 1
    ]
    balance = [(name, number(value)) for name, value in card["balance"].items()]
    distinct = [(name, number(value)) for name, value in card["distinct"].items() if value is not None]
    rows = [
        *distinct,
        *((f"balance of {name}", value) for name, value in balance),
        ("different roots", number(card["different_roots"])),
        ("question templates", number(card["templates"]["different"])),
        ("question templates, effective number", number(card["templates"]["effective"])),
    ]
    rows += [(f"pictures: {name.replace('_', ' ')}", number(value)) for name, value in card["pictures"].items()]
    charts = tag(
        "div",
        *(tag("div", chart, cls="card") for chart in (bars("verb · noun", roots), *groups)),
        cls="charts wide-charts",
    )
    return tag("div", charts, tag("div", table(("figure", "value"), rows, numeric=(1,)), cls="card"))


def _complexity(card: dict[str, Any]) -> Markup:
    rows = [
        (name.replace("_", " "), *(number(s[k]) for k in ("mean", "p5", "median", "p95")))
        for name, s in card.items()
        if s
    ]
    return tag("div", table(("a record", "mean", "5 %", "median", "95 %"), rows, numeric=(1, 2, 3, 4)), cls="card")


def _models(card: dict[str, Any]) -> Markup:
    spread = [(f"spread of {name}", number(value), "", "", "") for name, value in card.get("spread", {}).items()]
    rows = _complexity({name: held for name, held in card.items() if name != "spread"})
    return tag(
        "div", rows, table(("CLIP", "cosine distance"), [row[:2] for row in spread], numeric=(1,)) if spread else None
    )


def _histograms(card: dict[str, Any]) -> Markup:
    charts = [
        tag("div", histogram(f"{name.replace('_', ' ')}", held["counts"], held["edges"]), cls="card")
        for name, held in card["histograms"].items()
    ]
    return tag("div", *charts, cls="charts")


def _provenance(card: dict[str, Any]) -> Markup:
    rows = [("licence", name, number(count)) for name, count in card["licences"].items()]
    rows += [("source", name, number(count)) for name, count in card["sources"].items()]
    cost = f"Cost recorded: {card['cost_usd']:,.2f} USD." if card["cost_usd"] is not None else "No cost is recorded."
    return tag("div", table(("", "name", "records"), rows, numeric=(2,)), tag("p", cost), cls="card")


def _rows_to_show(found: Measured) -> dict[str, list[int]]:
    shown = {}
    for name in TITLES:
        if name in found.numbers:
            shown[name] = np.flatnonzero(found.numbers[name] > 0)[:EXAMPLES].tolist()
    return shown


def _read_examples(found: Measured, wanted: dict[str, list[int]]) -> dict[int, Record]:
    rows = {row for some in wanted.values() for row in some}
    rows |= {int(found.earlier[row]) for row in wanted.get("duplicate", []) if found.earlier[row] >= 0}
    rows |= set(np.argsort(-np.nan_to_num(found.numbers["quality"]), kind="stable")[:EXAMPLES].tolist())
    held: dict[int, Record] = {}
    last = max(rows, default=-1)
    for row, raw in enumerate(iter_json_records(found.path)):
        if row > last:
            break
        if row in rows:
            try:
                held[row] = read_record(row, raw)[0]
            except DataError:
                continue
    return held


def _faults(name: str, card: dict[str, Any], found: Measured, examples: dict[int, Record], root: Path | None) -> Markup:
    rows = np.flatnonzero(found.numbers[name] > 0)[:EXAMPLES].tolist()
    head = tag("h2", TITLES[name], tag("span", f" {card['faults'][name]:,} records", cls="soft"))
    return tag("section", head, tag("p", MEANING[name], cls="soft"), _cards(rows, found, examples, root, name), id=name)


def _cards(rows: list[int], found: Measured, examples: dict[int, Record], root: Path | None, name: str) -> Markup:
    cards = []
    for row in rows:
        record = examples.get(row)
        if record is None:
            continue
        value = f"{name} {number(float(found.numbers[name][row]))}"
        head = tag("div", tag("b", record.id), tag("span", value, cls="badge"), cls="row")
        shown = [_picture(image, root) for image in record.images[:2]]
        earlier = examples.get(int(found.earlier[row])) if name == "duplicate" else None
        cards.append(
            tag("div", head, tag("div", *shown, cls="pictures") if shown else None, *_turns(record),
                tag("p", f"repeats {earlier.id}:", cls="soft small") if earlier else None,
                *(_turns(earlier) if earlier else ()), cls="sample")
        )  # fmt: skip
    return tag("div", *cards, cls="samples")


def _turns(record: Record, most: int = 8) -> list[Markup]:
    return [
        tag("div", tag("b", turn.role), turn.text.replace("<image>", "").strip()[:400], cls="qa")
        for turn in record.turns[:most]
    ]


def _picture(image: str, root: Path | None) -> Markup:
    if root is None:
        return tag("div", image, cls="no-picture")
    try:
        return picture(resolve_image(image, root), max_side=224, alt=image)
    except DataError:
        return tag("div", f"picture cannot be read: {image}", cls="no-picture")


def _kept(card: dict[str, Any]) -> Markup | None:
    kept = card.get("kept")
    if not kept:
        return None
    rows = [(name, number(count)) for name, count in kept["reasons"].items()]
    text = f"{short(kept['records'])} records were kept, {short(kept['removed'])} removed; a record may have several reasons."
    return tag("section", tag("h2", "Filtered"), tag("p", text), table(("reason", "records"), rows, numeric=(1,)))
