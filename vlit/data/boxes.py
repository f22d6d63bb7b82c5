"""How published systems write boxes into text: one interface, six forms, exact on each form's grid.

| form | one box | grid | several boxes | source |
|---|---|---|---|---|
| ``llava`` | ``[0.12, 0.30, 0.50, 1.00]`` | 1/100 | one after the other | LLaVA-1.5, arXiv:2310.03744 |
| ``minigpt_v2`` | ``{<12><30><50><100>}`` | 1/100 | joined by ``<delim>`` | MiniGPT-v2, arXiv:2310.09478 |
| ``qwen_vl`` | ``<box>(120,300),(500,999)</box>`` | 1/999 | one after the other | Qwen-VL, arXiv:2308.12966 |
| ``cogvlm`` | ``[[120,300,500,999]]`` | 1/1000, at most 999 | joined by ``;`` | CogVLM, arXiv:2311.03079 |
| ``shikra`` | ``[0.120,0.300,0.500,1.000]`` | 1/1000 | joined by ``;`` | Shikra, arXiv:2306.15195 |
| ``ofa`` | ``<bin_120> <bin_300> <bin_500> <bin_999>`` | 1/999 | one after the other | OFA, arXiv:2202.03052; MultiInstruct |

A box is (x0, y0, x1, y1) as shares of the picture's width and height. Qwen-VL's text says 0 to 999 and its evaluation divides
by 999, so 1.0 is 999 here; CogVLM's divides by 1000, so its largest edge is 0.999. OFA's edges are shares of the *longer side*
(it scales that to 512 pixels and divides both axes by 512), so its text can be written and read only with the picture's size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from vlit.data.record import Box, Region
from vlit.errors import DataError, did_you_mean

Size = tuple[float, float]
"""Width and height of a picture in pixels; only their ratio counts here."""


class Mention(NamedTuple):
    """Boxes found in a text: what they are of (where the form says so) and the characters [start, end) they take."""

    label: str
    boxes: tuple[Box, ...]
    start: int
    end: int


@dataclass(frozen=True)
class BoxForm:
    """One way to write boxes.

    ``divisor``: an edge is a whole number of ``1 / divisor``, at most ``highest``. ``decimals``: edges are written as
    decimal fractions with so many digits; None: as whole numbers, with ``digits`` of them at least.
    """

    name: str
    divisor: int
    highest: int
    opening: str
    between: tuple[str, str, str]
    closing: str
    joined: str
    """Between two boxes that are written together."""
    outer: tuple[str, str] = ("", "")
    """Around boxes that are written together."""
    decimals: int | None = None
    digits: int = 1
    label: tuple[str, str] = ("", "")
    """Around the words that a box is of, in front of it."""
    longer_side: bool = False
    """Edges are shares of the picture's longer side. All methods then need its ``size``, and raise DataError without one."""

    def snap(self, box: Box, size: Size | None = None) -> Box:
        """The nearest box on the grid: what :meth:`decode` gives for :meth:`encode` of it."""
        x0, y0, x1, y1 = (self._value(self._level(edge)) for edge in self._as_written(box, size))
        return self._of_both_sides((x0, y0, x1, y1), size)

    def encode(self, boxes: Sequence[Box], size: Size | None = None) -> str:
        """The text of some boxes."""
        if not boxes:
            raise DataError(f"boxes of form {self.name}: there is none to write. Give at least one box.")
        written = []
        for box in boxes:
            if not all(0 <= edge <= 1 for edge in box) or box[0] > box[2] or box[1] > box[3]:
                raise DataError(f"box {box}: expected x0 <= x1 and y0 <= y1, as shares of the picture from 0 to 1.")
            first, *others = (self._text(self._level(edge)) for edge in self._as_written(box, size))
            inner = first + "".join(mark + edge for mark, edge in zip(self.between, others, strict=True))
            written.append(self.opening + inner + self.closing)
        return self.outer[0] + self.joined.join(written) + self.outer[1]

    def name_boxes(self, label: str, boxes: Sequence[Box], size: Size | None = None) -> str:
        """Words and their boxes, in the form's own way: ``<ref>the cat</ref><box>…</box>``."""
        space = "" if self.name == "qwen_vl" else " "
        return f"{self.label[0]}{label}{self.label[1]}{space}{self.encode(boxes, size)}"

    def find(self, text: str, size: Size | None = None) -> list[Mention]:
        """All boxes of a text, in order; boxes that are written together are one mention.

        Raises:
            DataError: something written as a box lies outside its grid, or its corners are the wrong way round.
        """
        found = []
        for match in self._group.finditer(text):
            boxes = tuple(self._of_both_sides(self._box(one), size) for one in self._one.finditer(match["boxes"]))
            found.append(Mention((match["label"] or "").strip(), boxes, match.start(), match.end()))
        return found

    def decode(self, text: str, size: Size | None = None) -> list[Box]:
        """All boxes of a text, in order."""
        return [box for mention in self.find(text, size) for box in mention.boxes]

    def regions(self, text: str, *, image: int = 0) -> list[Region]:
        """All boxes of a text as regions of an image."""
        return [Region(mention.label, box, image) for mention in self.find(text) for box in mention.boxes]

    def rewrite(self, text: str, other: BoxForm, size: Size | None = None) -> str:
        """The text with every box written in another form; labels keep their words."""
        parts, at = [], 0
        for mention in self.find(text, size):
            label, boxes = mention.label, mention.boxes
            written = other.name_boxes(label, boxes, size) if label else other.encode(boxes, size)
            parts += [text[at : mention.start], written]
            at = mention.end
        return "".join([*parts, text[at:]])

    def _scale(self, size: Size | None) -> tuple[float, float]:
        """What a share of width and one of height are of the side that edges are counted in."""
        if not self.longer_side:
            return 1.0, 1.0
        if size is None:
            raise DataError(
                f"boxes of form {self.name} are shares of the picture's longer side, and its size is not known here. "
                "Choose another form."
            )
        return size[0] / max(size), size[1] / max(size)

    def _as_written(self, box: Box, size: Size | None) -> Box:
        x, y = self._scale(size)
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    def _of_both_sides(self, box: Box, size: Size | None) -> Box:
        """The inverse of :meth:`_as_written`; what lies outside of the picture by rounding is put on its edge."""
        x, y = self._scale(size)
        return min(1.0, box[0] / x), min(1.0, box[1] / y), min(1.0, box[2] / x), min(1.0, box[3] / y)

    def _level(self, edge: float) -> int:
        return min(self.highest, round(edge * self.divisor))

    def _value(self, level: int) -> float:
        return level / self.divisor

    def _text(self, level: int) -> str:
        return f"{level:0{self.digits}d}" if self.decimals is None else f"{level / self.divisor:.{self.decimals}f}"

    def _box(self, match: re.Match[str]) -> Box:
        if self.decimals is None:
            levels = [int(edge) for edge in match.groups()]
            x0, y0, x1, y1 = (self._value(level) for level in levels)
            wrong = max(levels) > self.highest
        else:
            x0, y0, x1, y1 = (float(edge) for edge in match.groups())
            wrong = max(x0, y0, x1, y1) > 1
        if wrong or x0 > x1 or y0 > y1:
            most = self.highest if self.decimals is None else 1
            raise DataError(
                f"box {match[0]!r} of form {self.name}: expected numbers from 0 to {most}, with x0 <= x1 and y0 <= y1"
            )
        return x0, y0, x1, y1

    @functools.cached_property
    def _one(self) -> re.Pattern[str]:
        edge = r"(\d{1,4})" if self.decimals is None else r"(\d\.\d{1,4})"
        marks = [re.escape(mark.strip()) for mark in self.between]
        inner = edge + "".join(rf"\s*{mark}\s*{edge}" if mark else rf"\s*{edge}" for mark in marks)
        return re.compile(rf"{re.escape(self.opening)}\s*{inner}\s*{re.escape(self.closing)}")

    @functools.cached_property
    def _group(self) -> re.Pattern[str]:
        one = self._one.pattern.replace("(\\d", "(?:\\d")
        before, after = (re.escape(mark) for mark in self.outer)
        joint = rf"\s*{re.escape(self.joined.strip())}\s*" if self.joined else r"\s*"
        boxes = rf"(?P<boxes>{before}{one}(?:{joint}{one})*{after})"
        words = rf"(?:{re.escape(self.label[0])}(?P<label>[^<>]*){re.escape(self.label[1])}\s*)?"
        return re.compile((words if self.label[0] else r"(?P<label>)") + boxes)


_COMMAS = (",", ",", ",")
_SPACED = (", ", ", ", ", ")
FORMS = {
    form.name: form
    for form in (
        BoxForm("llava", 100, 100, "[", _SPACED, "]", " ", decimals=2),
        BoxForm("minigpt_v2", 100, 100, "{<", ("><", "><", "><"), ">}", "<delim>", label=("<p>", "</p>")),
        BoxForm("qwen_vl", 999, 999, "<box>(", (",", "),(", ","), ")</box>", "", label=("<ref>", "</ref>")),
        BoxForm("cogvlm", 1000, 999, "", _COMMAS, "", ";", ("[[", "]]"), digits=3),
        BoxForm("ofa", 999, 999, "<bin_", ("> <bin_", "> <bin_", "> <bin_"), ">", " ", longer_side=True),
        BoxForm("shikra", 1000, 1000, "", _COMMAS, "", ";", ("[", "]"), decimals=3),
    )
}
"""The published forms by name."""


def _known(name: str) -> str:
    if name not in FORMS:
        raise ValueError(f'unknown box form "{name}". Known: {", ".join(FORMS)}')
    return name


KnownForm = Annotated[str, AfterValidator(_known)]
"""Configuration field: the name of a form."""


def box_form(name: str) -> BoxForm:
    """The form of that name; DataError with the known names otherwise."""
    if name not in FORMS:
        raise DataError(f'box form "{name}" is unknown. {did_you_mean(name, FORMS)}')
    return FORMS[name]
