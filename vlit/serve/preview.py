"""See before you spend: the first samples as the model will see them, token by token, and how they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlit.errors import ConfigError
from vlit.serve.charts import legend
from vlit.serve.markup import Markup, join, page, percent, picture_of, tag
from vlit.serve.preview_data import (
    NEWLINE,
    SPACE,
    TAB,
    PreviewImage,
    PreviewRow,
    PreviewSample,
    PreviewStage,
    PreviewToken,
    collect_preview,
    visible,
)
from vlit.serve.preview_terminal import print_preview

if TYPE_CHECKING:
    from vlit.config.schema import RunConfig

BAR_WIDTH, BAR_HEIGHT = 940, 22


def write_preview(
    run: RunConfig, *, stages: Sequence[str], out: Path, samples: int = 16, terminal: bool = True
) -> Path:
    """Collect the stages' previews, write them as one HTML file, and print them unless ``terminal`` is off.

    Raises:
        ConfigError: ``out`` is a folder.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder. Name the file to write, for example {out / 'preview.html'}.")
    collected = [collect_preview(run, stage, samples=samples) for stage in stages]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(build_preview(collected, title=run.name), encoding="utf-8")
    if terminal:
        for stage in collected:
            print_preview(stage)
    return out


def build_preview(stages: Sequence[PreviewStage], *, title: str = "preview") -> str:
    """The preview of one or more stages as a self-contained page."""
    links = tag("nav", *(tag("a", stage.name, href=f"#stage-{stage.name}") for stage in stages))
    return page(
        f"{title} · vlit preview",
        tag("h1", title),
        tag("p", "The first samples in training order, exactly as the model will see them. ", cls="soft"),
        links if len(stages) > 1 else None,
        _key(),
        *(tag("section", _stage(stage), id=f"stage-{stage.name}") for stage in stages),
    )


def _key() -> Markup:
    words = [
        ("target", "takes loss: the model is trained to say it"),
        ("", "read only"),
        ("special", "special token"),
        ("image", "pictures"),
    ]
    entries = [tag("span", tag("span", "token", cls=f"t {cls}"), meaning) for cls, meaning in words]
    marks = f"{SPACE} space, {NEWLINE} new line, {TAB} tab. Point at a token for its position, id and label."
    return tag("div", *entries, tag("span", marks), cls="legend")


def _stage(stage: PreviewStage) -> Markup:
    usable = [sample for sample in stage.samples if sample.error is None]
    tokens = sum(sample.num_tokens for sample in usable)
    supervised = sum(sample.num_supervised for sample in usable)
    images = sum(token.count for sample in usable for token in sample.tokens if token.kind == "image")
    shortened = sum(bool(sample.dropped or sample.cut_tokens) for sample in usable)
    tiles = [
        ("Samples shown", f"{len(stage.samples)}", f"{len(stage.samples) - len(usable)} unusable"),
        ("Tokens", f"{tokens:,}", f"{percent(images / tokens)} of them pictures" if tokens else ""),
        ("Supervised tokens", f"{supervised:,}", percent(supervised / tokens) if tokens else ""),
        ("Shortened samples", f"{shortened}", "turns dropped or answer cut"),
    ]
    if stage.rows:
        fill = sum(row.num_tokens for row in stage.rows) / sum(row.capacity for row in stage.rows)
        tiles.append(("Fill of packed rows", percent(fill), f"first {len({row.step for row in stage.rows})} steps"))
    return join(
        [
            tag("h2", f"Stage {stage.name}"),
            tag("div", *(_tile(*tile) for tile in tiles), cls="tiles"),
            tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in stage.facts), cls="facts"),
            tag("div", *(tag("p", note) for note in stage.notes), cls="note") if stage.notes else None,
            _packing(stage.rows),
            tag("h3", "Samples"),
            *(_sample(number, sample) for number, sample in enumerate(stage.samples, start=1)),
        ]
    )


def _tile(label: str, value: str, under: str) -> Markup:
    parts = (("label", label), ("value", value), ("under", under))
    return tag("div", *(tag("div", text, cls=cls) for cls, text in parts), cls="tile")


def _sample(number: int, sample: PreviewSample) -> Markup:
    head = [tag("b", f"{number}. {sample.id}"), tag("span", f"{sample.source} · {sample.place}", cls="soft small meta")]
    if sample.error is not None:
        badge = tag("span", "✗ unusable", cls="badge bad")
        return tag("article", tag("div", *head, badge, cls="heads"), tag("p", sample.error), cls="card")
    share = sample.num_supervised / max(sample.num_tokens, 1)
    counts = f"{sample.num_tokens:,} tokens, {sample.num_supervised:,} supervised ({percent(share)})"
    head.append(tag("span", counts, cls="badge"))
    if sample.num_supervised == 0:
        head.append(tag("span", "✗ nothing to learn", cls="badge bad"))
    if sample.dropped:
        head.append(tag("span", f"{len(sample.dropped)} turns dropped", cls="badge bad"))
    if sample.cut_tokens:
        head.append(tag("span", f"answer cut by {sample.cut_tokens:,} tokens", cls="badge bad"))
    shown = tag("div", *(_image(image) for image in sample.images), cls="pictures") if sample.images else None
    text = tag("div", *tokens_html(sample), cls="tokens")
    dropped = [tag("div", tag("b", f"dropped, {role}"), words, cls="qa dropped") for role, words in sample.dropped]
    return tag("article", tag("div", *head, cls="heads"), shown, text, *dropped, cls="card")


def _image(image: PreviewImage) -> Markup:
    from PIL import Image

    return picture_of(Image.fromarray(image.pixels), max_side=336, alt=image.name)


def tokens_html(sample: PreviewSample) -> list[Markup]:
    """One span a token (one an image), a line break after each token that ends a line."""
    texts = {token.token_id: token.text for token in sample.tokens if token.text}
    parts: list[Markup] = []
    for token in sample.tokens:
        parts.append(_token(token, texts))
        if "\n" in token.text:
            parts.append(tag("br"))
    if sample.cut_tokens:
        parts.append(tag("span", f"✂ {sample.cut_tokens:,} tokens cut", cls="t cut"))
    return parts


def _token(token: PreviewToken, texts: dict[int, str]) -> Markup:
    first, last = token.position, token.position + token.count - 1
    lines = [f"position {first}" if token.count == 1 else f"positions {first} to {last}"]
    if token.kind != "image":
        lines.append(f"id {token.token_id}")
    if token.label is None:
        lines.append("label: none, its prediction takes no loss")
    else:
        said = texts.get(token.label)
        lines.append(f"label: must predict {token.label}" + (f" {visible(said)}" if said else ""))
    shown = f"{token.text} × {token.count}" if token.kind == "image" else visible(token.text) or "◌"
    kind = token.kind if token.kind != "text" else ""
    return tag("span", shown, cls=f"t {kind} {'target' if token.supervised else ''}".strip(), title="\n".join(lines))


def _packing(rows: Sequence[PreviewRow]) -> Markup | None:
    """Rows as bars: pictures, text that is read, text that is learnt; the outline is a sample, the end is the room."""
    if not rows:
        return None
    shown = legend([("f1", "pictures"), ("read", "read only"), ("f3", "supervised"), ("room", "free room")])
    order = tag(
        "p", "One bar a row, one outline a sample; colours show amounts within it, not their order.", cls="small"
    )
    blocks: list[Markup] = [tag("h3", "Packing of the first steps"), order, shown]
    for step in sorted({row.step for row in rows}):
        of_step = [row for row in rows if row.step == step]
        samples = sum(row.num_samples for row in of_step)
        tokens = sum(row.num_tokens for row in of_step)
        words = (
            f"Step {step + 1}: {samples:,} samples, {tokens:,} tokens in {len(of_step)} row{'s' * (len(of_step) != 1)}"
        )
        blocks.append(tag("p", words, cls="small soft"))
        blocks.append(tag("div", *(_bar(row) for row in of_step), cls="scroll wide"))
    return tag("div", *blocks, cls="card")


def _bar(row: PreviewRow) -> Markup:
    scale = BAR_WIDTH / max(row.capacity, row.num_tokens, 1)
    parts = [tag("rect", x=0, y=2, width=BAR_WIDTH, height=BAR_HEIGHT - 4, rx=3, cls="room")]
    at = 0.0
    for segment in row.segments:
        read = segment.tokens - segment.image_tokens - segment.supervised
        counts = ((segment.image_tokens, "f1"), (read, "read"), (segment.supervised, "f3"))
        words = f"{segment.tokens:,} tokens: {segment.image_tokens:,} of pictures, {segment.supervised:,} supervised"
        inside = [tag("title", f"{segment.id} ({segment.source})\n{words}")]
        x = at
        for count, cls in counts:
            inside.append(tag("rect", x=f"{x:.2f}", y=2, width=f"{count * scale:.2f}", height=BAR_HEIGHT - 4, cls=cls))
            x += count * scale
        width = f"{segment.tokens * scale:.2f}"
        inside.append(tag("rect", x=f"{at:.2f}", y=2, width=width, height=BAR_HEIGHT - 4, cls="segment"))
        parts.append(tag("g", *inside))
        at = x
    fill = percent(row.num_tokens / row.capacity)
    parts.append(tag("text", fill, x=BAR_WIDTH + 10, y=BAR_HEIGHT - 6))
    label = f"{row.num_samples} samples, {row.num_tokens} of {row.capacity} tokens"
    return tag("svg", *parts, viewBox=f"0 0 {BAR_WIDTH + 80} {BAR_HEIGHT}", role="img", aria_label=label)
