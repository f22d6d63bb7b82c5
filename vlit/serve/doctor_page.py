"""What ``vlit doctor`` found, as a self-contained page and as a table for the terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from vlit.data.doctor.checks import CHECKS, title_of
from vlit.serve.markup import Markup, duration, join, number, page, percent, picture_of, table, tag

if TYPE_CHECKING:
    from vlit.data.doctor.scan import Diagnosis
    from vlit.data.doctor.tally import Example


def build_page(diagnosis: Diagnosis, *, title: str) -> str:
    """Counts by check and by dataset, examples with pictures, and what to do."""
    checks = diagnosis.summary["checks"]
    return page(
        f"{title} · vlit doctor",
        tag("h1", title),
        tag("p", _verdict(diagnosis), cls="soft"),
        tag("nav", *(tag("a", title_of(check), href=f"#check-{check}") for check in checks)) if checks else None,
        tag("div", *(_tile(*tile) for tile in _tiles(diagnosis)), cls="tiles"),
        _unreadable(diagnosis),
        tag("section", tag("h2", "Findings"), _by_check(checks), id="checks"),
        tag("section", tag("h2", "Datasets"), _by_source(diagnosis), id="sources"),
        *(_section(check, found, diagnosis) for check, found in checks.items()),
    )


def findings_table(diagnosis: Diagnosis) -> Any:
    """A rich table: one row a check, the total below."""
    from rich.table import Table

    summary = diagnosis.summary
    shown = Table(title="vlit doctor", title_justify="left")
    for column in ("finding", "severity", "records", "images", "example"):
        shown.add_column(column, justify="right" if column in ("records", "images") else "left", overflow="fold")
    for check, found in summary["checks"].items():
        examples = diagnosis.tally.examples.get(check, [])
        style = "red" if found["severity"] == "error" else "dim"
        counts = [f"{found['records']:,}", f"{found['images']:,}" if "images" in found else ""]
        shown.add_row(title_of(check), found["severity"], *counts, examples[0].place if examples else "", style=style)
    shown.add_section()
    seconds = duration(summary["seconds"]["all"])
    bad = f"{summary['bad_records']:,} of {summary['records']:,} records are bad"
    shown.add_row(bad, "", "", f"{summary['images']:,}", f"{seconds}, {summary['workers']} workers")
    return shown


def _verdict(diagnosis: Diagnosis) -> str:
    summary = diagnosis.summary
    if diagnosis.unreadable:
        return f"{len(diagnosis.unreadable)} datasets cannot be examined, so training would not start."
    if not summary["bad_records"]:
        return "No bad record: training will not stop for its data."
    return (
        f"{summary['bad_records']:,} bad records. Training leaves them out under data.on_bad_sample: quarantine, and does not "
        "start under error."
    )


def _tiles(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    summary = diagnosis.summary
    records, bad, seconds = summary["records"], summary["bad_records"], summary["seconds"]
    looked = "decoded" if summary["images_looked_at"] == "decoded" else "headers read"
    return [
        ("Records", f"{records:,}", f"{number(round(summary['records_per_second']))} a second"),
        ("Bad records", f"{bad:,}", percent(bad / records, digits=3) if records else ""),
        (
            "Distinct images",
            f"{summary['images']:,}",
            f"{looked}, {number(round(summary['images_per_second']))} a second",
        ),
        ("Time", duration(seconds["all"]), f"{summary['workers']} worker{'s' * (summary['workers'] != 1)}"),
    ]


def _tile(label: str, value: str, under: str) -> Markup:
    parts = (("label", label), ("value", value), ("under", under))
    return tag("div", *(tag("div", text, cls=cls) for cls, text in parts), cls="tile")


def _unreadable(diagnosis: Diagnosis) -> Markup | None:
    if not diagnosis.unreadable:
        return None
    lines = [tag("p", tag("b", f"{f.name} ({', '.join(f.uses)}): "), f.reason) for f in diagnosis.unreadable]
    return tag(
        "section", tag("h2", "Datasets that cannot be examined"), tag("div", *lines, cls="note"), id="unreadable"
    )


def _badge(severity: str) -> Markup:
    return tag(
        "span", "✗ error" if severity == "error" else "note", cls="badge bad" if severity == "error" else "badge"
    )


def _by_check(checks: dict[str, Any]) -> Markup:
    if not checks:
        return tag("p", "Nothing was found.")
    rows = [
        (
            tag("a", title_of(check), href=f"#check-{check}"),
            _badge(found["severity"]),
            f"{found['records']:,}",
            f"{found['images']:,}" if "images" in found else "",
        )
        for check, found in checks.items()
    ]
    return tag("div", table(("finding", "severity", "records", "images"), rows, numeric=(2, 3)), cls="card")


def _by_source(diagnosis: Diagnosis) -> Markup:
    rows = []
    for source in diagnosis.tally.sources:
        found = ", ".join(f"{title_of(check)} {count:,}" for check, count in source.as_dict()["checks"].items())
        share = percent(source.bad_records / source.records, digits=3) if source.records else ""
        name = join([tag("b", source.source), tag("div", source.file, cls="soft small meta")])
        rows.append((name, ", ".join(source.stages), f"{source.records:,}", f"{source.bad_records:,}", share, found))
    header = ("dataset", "stages", "records", "bad", "share", "findings, in records")
    return tag("div", table(header, rows, numeric=(2, 3, 4)), cls="card")


def _section(check: str, found: dict[str, Any], diagnosis: Diagnosis) -> Markup:
    examples = diagnosis.tally.examples.get(check, [])
    counts = f"{found['records']:,} records" + (f", {found['images']:,} images" if "images" in found else "")
    rest = found["records"] - len(examples)
    return tag(
        "section",
        tag("h2", title_of(check), " ", _badge(found["severity"])),
        tag("p", counts, cls="soft"),
        tag("p", tag("b", "What to do: "), CHECKS[check].fix, cls="fix") if check in CHECKS else None,
        *(_example(example) for example in examples),
        tag("p", f"and {rest:,} more", cls="soft small") if rest > 0 and examples else None,
        id=f"check-{check}",
    )


def _example(example: Example) -> Markup:
    picture = None
    if example.thumbnail is not None:
        from PIL import Image

        with Image.open(io.BytesIO(example.thumbnail)) as image:
            picture = tag("div", picture_of(image, max_side=224, alt=example.image), cls="pictures")
    head = [tag("b", example.place), tag("span", example.source, cls="soft small meta")]
    excerpt = tag("div", example.excerpt, cls="qa") if example.excerpt else None
    return tag("article", tag("div", *head, cls="heads"), tag("p", example.reason), picture, excerpt, cls="card")
