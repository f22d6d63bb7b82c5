"""The preview in a terminal: pictures as coloured half blocks, tokens with what takes loss highlighted, packing as bars."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from vlit.serve.preview_data import PreviewRow, PreviewSample, PreviewStage, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PICTURE_CELLS = 32
BAR_CELLS = 60
STYLES = {
    "target": ("black on green3", "black on spring_green3"),
    "special": ("bold magenta", "bold magenta"),
    "image": ("bold blue", "bold blue"),
    "text": ("default", "dim"),
}


def print_preview(stage: PreviewStage, *, console: Console | None = None) -> None:
    """Print a stage's samples and packing. Pictures are drawn only where the terminal has colours."""
    from rich.console import Console
    from rich.rule import Rule
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else 110)
    console.print(Rule(f"stage {stage.name}"))
    for name, value in stage.facts:
        console.print(Text(f"{name}: ", style="dim").append(value, style="default not dim"))
    for note in stage.notes:
        console.print(Text(note, style="yellow"))
    coloured = console.color_system is not None
    if coloured:
        key = [("takes loss", "target"), ("read only", "text"), ("special token", "special"), ("<image>", "image")]
        console.print(Text("   ").join(Text(words, STYLES[style][0]) for words, style in key))
    else:
        console.print("[takes loss]  read only|", markup=False)
    for number, sample in enumerate(stage.samples, start=1):
        console.print()
        console.print(Text(f"{number}. {sample.id}", style="bold").append(f"  {sample.place}", "not bold dim"))
        if sample.error is not None:
            console.print(Text(f"unusable: {sample.error}", style="red"))
            continue
        if coloured:
            for image in sample.images:
                console.print(picture_text(image.pixels))
        console.print(tokens_text(sample, coloured=coloured))
        for role, words in sample.dropped:
            console.print(Text(f"dropped, {role}: {words}", style="red strike"))
        console.print(Text(_counts(sample), style="dim"))
    if stage.rows:
        console.print()
        for row in stage.rows:
            console.print(row_text(row))


def _counts(sample: PreviewSample) -> str:
    images = f", {len(sample.images)} pictures" if sample.images else ""
    share = 100 * sample.num_supervised / max(sample.num_tokens, 1)
    return f"{sample.num_tokens:,} tokens, {sample.num_supervised:,} supervised ({share:.1f} %){images}"


def tokens_text(sample: PreviewSample, *, coloured: bool = True) -> Text:
    """The sample's tokens. Neighbours differ in shade; without colours, bars part them and brackets hold targets."""
    from rich.text import Text

    text = Text(overflow="fold")
    for at, token in enumerate(sample.tokens):
        shown = f"<image x {token.count}>" if token.kind == "image" else visible(token.text) or "◌"
        if not coloured:
            shown = f"[{shown}]" if token.supervised else f"{shown}|"
        style = "target" if token.supervised else token.kind
        text.append(shown, style=STYLES[style][at % 2])
        if "\n" in token.text:
            text.append("\n")
    if sample.cut_tokens:
        text.append(f" [{sample.cut_tokens:,} tokens cut]", style="red")
    return text


def picture_text(pixels: np.ndarray, *, cells: int = PICTURE_CELLS) -> Text:
    """A picture (uint8 [H, W, 3]) in half blocks: two pixel rows a line."""
    from PIL import Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    height = max(2, round(cells * pixels.shape[0] / pixels.shape[1] / 2) * 2)
    small = np.asarray(Image.fromarray(pixels).resize((cells, height), Image.Resampling.BOX))
    text = Text()
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    text.right_crop(1)
    return text


def row_text(row: PreviewRow) -> Text:
    """``step 1 |██▓▓░░| 97.8 % 7 samples``: neighbouring samples differ in shade, dots are free room."""
    from rich.text import Text

    text = Text(f"step {row.step + 1:>2}  ", style="dim")
    scale = BAR_CELLS / max(row.capacity, row.num_tokens, 1)
    filled = done = 0
    for number, segment in enumerate(row.segments):
        done += segment.tokens
        cells = round(done * scale) - filled
        text.append("█▓"[number % 2] * cells, style="blue" if segment.image_tokens else "cyan")
        filled += cells
    text.append("·" * (BAR_CELLS - filled), style="dim")
    return text.append(f"  {100 * row.num_tokens / row.capacity:5.1f} %  {row.num_samples} samples", style="default")
