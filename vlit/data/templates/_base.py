"""What a chat template is: turns -> pieces, each tokenised once and on its own.

A piece boundary stands at every special token, at every image and around every supervised span, so a mask never has to
be found again in a string, and nothing can straddle it. Supervised is what the model must say itself: the assistant's
text and what ends it. A space that leads an answer belongs to the answer, so the prompt of generation is, token for
token, a prefix of the training sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from vlit.config.component import ComponentConfig
from vlit.data.text import traits_of
from vlit.errors import DataError
from vlit.types import IMAGE_PLACEHOLDER, Piece, Turn

Exchange = tuple[str, str | None]
"""A question and its answer; None = the answer is to be generated."""


class TemplateConfig(ComponentConfig):
    """Base of the templates. A subclass writes one exchange after another in ``write`` and what ends an answer in
    ``write_end``.
    """

    system: str | None = None
    """System text for records that have none. Default: the template's own; empty: none."""

    default_system: ClassVar[str] = ""
    specials: ClassVar[tuple[str, ...]] = ()
    """Special tokens the template asks for; one that a tokenizer lacks is written as ordinary text."""
    inline_bos: ClassVar[bool] = False
    """The text itself holds the begin token, so that what follows continues it instead of starting a text."""

    def render(self, turns: Sequence[Turn], *, tokenizer: Any, generation_prompt: bool = False) -> list[Piece]:
        """Pieces of a conversation in order; images are numbered in reading order.

        With ``generation_prompt`` the turns end with the user's and the pieces with whatever stands before the answer.
        """
        system, exchanges = split_turns(turns, generation_prompt=generation_prompt)
        if system is None:
            system = self.default_system if self.system is None else self.system
        writer = PieceWriter(tokenizer)
        self.write(writer, system, exchanges)
        return writer.pieces

    def end(self, tokenizer: Any) -> list[Piece]:
        """The pieces that end an answer."""
        writer = PieceWriter(tokenizer)
        self.write_end(writer)
        return writer.pieces

    def write(self, writer: PieceWriter, system: str, exchanges: list[Exchange]) -> None:
        """Write a whole conversation; stop before an answer that is None."""
        raise NotImplementedError(f"{type(self).__name__} must implement write")

    def write_end(self, writer: PieceWriter) -> None:
        """Write what ends an answer, supervised."""
        raise NotImplementedError(f"{type(self).__name__} must implement write_end")


class PieceWriter:
    """Appends pieces and keeps their rules."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.traits = traits_of(tokenizer)
        self.pieces: list[Piece] = []
        self._num_images = 0

    def has(self, token: str) -> bool:
        """True when the tokenizer knows ``token`` as a special token."""
        return token in self.traits.specials

    def text(self, text: str, *, supervised: bool = False) -> None:
        """Ordinary text. Runs of unsupervised text are one piece, as a tokenizer would see them."""
        if not text:
            return
        last = self.pieces[-1] if self.pieces else None
        if not supervised and last is not None and last.kind == "text" and not last.supervised:
            self.pieces[-1] = Piece("text", last.text + text)
        else:
            self.pieces.append(Piece("text", text, supervised=supervised))

    def special(self, token: str, *, supervised: bool = False) -> None:
        """One special token, or its string as ordinary text when the tokenizer has no such token."""
        if self.has(token):
            self.pieces.append(Piece("special", token, supervised=supervised))
        else:
            self.text(token, supervised=supervised)

    def bos(self) -> None:
        """The begin token, if this tokenizer puts one in front of texts."""
        if self.traits.bos is not None:
            self.pieces.append(Piece("special", self.traits.bos))

    def eos(self, token: str) -> None:
        """Supervised end of an answer: ``token``, else the tokenizer's own end token, else ``token`` as text."""
        self.special(token if self.has(token) or not self.traits.eos else self.traits.eos, supervised=True)

    def user(self, text: str) -> None:
        """A user's text with its images."""
        for index, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
            if index:
                self.pieces.append(Piece("image", image=self._num_images))
                self._num_images += 1
            self.text(part)


def split_turns(turns: Sequence[Turn], *, generation_prompt: bool = False) -> tuple[str | None, list[Exchange]]:
    """(system text or None, exchanges); DataError when the order of roles is not system? (user assistant)+."""
    turns = list(turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else None
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    roles = [turn.role for turn in turns]
    if not turns or roles != expected[: len(turns)] or (len(turns) % 2 == 1) != generation_prompt:
        want = "user" if generation_prompt else "assistant"
        raise DataError(
            f"turns are {', '.join(roles) or 'missing'}, expected user and assistant in turn, ending with {want}. "
            "Fix the order of the turns."
        )
    answers: list[str | None] = [turn.text for turn in turns[1::2]]
    if generation_prompt:
        answers.append(None)
    return system, list(zip((turn.text for turn in turns[::2]), answers, strict=True))
