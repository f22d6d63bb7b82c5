"""The chat template that a tokenizer brings along (Jinja), with exact spans.

The Jinja program is run once for each sequence of roles, with markers in place of the texts; where the markers come out
is where the texts go. So spans are known without searching for anybody's text, special tokens in user text cannot be
mistaken for the template's own, and rendering a sample costs no Jinja at all. An answer that holds reasoning
(``</think>``) is shown to the program with its think tags and the white space beside them, because programs look for them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlit.data.templates._base import PieceWriter, TemplateConfig, split_turns
from vlit.data.templates._reasoning import Frame, has_reasoning, split_reasoning, write_reasoning
from vlit.data.text import traits_of
from vlit.errors import ConfigError, DataError
from vlit.registry import TEMPLATES
from vlit.types import Piece, Role, Turn

_MARK = "vlitmark{}x"
_EDGE = "\u2003"  # a space no template writes itself: where it is gone, the template strips texts


_Shape = tuple[Role, Frame | None]
"""What the layout of a turn depends on: its role, and its frame if it is an answer with reasoning. A turn with an empty
frame is empty and has no slot."""
_SYSTEM: _Shape = ("system", None)
_EMPTY_SYSTEM: _Shape = ("system", ())
_USER: _Shape = ("user", None)
_ASSISTANT: _Shape = ("assistant", None)


@dataclass(frozen=True)
class _Slot:
    """The place of one turn's text, and what the template writes before it.

    Attributes:
        words: what is written there: stretches of the turn's words by number, and the template's text between them.
        drops: the template leaves words before ``</think>`` out.
    """

    before: str
    strip_left: bool
    strip_right: bool
    words: tuple[int | str, ...] = (0,)
    drops: bool = False


@dataclass(frozen=True)
class _Layout:
    """A conversation of given roles: slots in order, what follows the last one, and whether the system text had to be
    folded into the first question because the template takes no system turn.
    """

    slots: tuple[_Slot, ...]
    after: str
    folded: bool


@TEMPLATES.register("tokenizer")
class TokenizerTemplate(TemplateConfig):
    """The tokenizer's own chat template. Supervised is an answer and what follows it up to and including the first
    special token. Where the template writes none, supervised is the text that it writes after an answer (if that is more
    than white space), and the last answer gets the tokenizer's end token.

    Texts are stripped where the template strips them. A system text is put in front of the first question when the
    template refuses system turns. ``system: ""`` gives the template an empty system turn where it would write a system
    text of its own; a template that writes it all the same is refused.

    Empty ``<think>`` blocks that a template puts before the last answer are not supervised. An answer's own reasoning (up
    to ``</think>``) is supervised where the template shows it; Qwen3's shows that of the last answer. An answer to be
    generated follows what the template puts before one without reasoning. A record whose last answer loses its reasoning
    is a bad record.
    """

    type: str = "tokenizer"
    inline_bos = True

    def render(self, turns: Sequence[Turn], *, tokenizer: Any, generation_prompt: bool = False) -> list[Piece]:
        own, _ = split_turns(turns, generation_prompt=generation_prompt)
        turns = list(turns)
        if own is None and self.system:
            turns.insert(0, Turn("system", self.system))
        emptied = own is None and self.system == "" and _needs_empty_system(tokenizer)
        shapes = (_shape_of(turn) for turn in turns)
        layout = _layout_of(tokenizer, (*[_EMPTY_SYSTEM] * emptied, *shapes, *[_ASSISTANT] * generation_prompt))
        if layout.folded:
            system_turn, question, *rest = turns
            turns = [Turn("user", f"{system_turn.text}\n\n{question.text}"), *rest]
        writer = PieceWriter(tokenizer)
        end = _end_of(tokenizer)
        for number, slot in enumerate(layout.slots):
            answered = number > 0 and turns[number - 1].role == "assistant"
            before = _write_end(writer, slot.before, end) if answered else slot.before
            if number == len(turns):  # the answer to be generated
                _write_literal(writer, before.removesuffix(" "))
                return writer.pieces
            text = turns[number].text
            text = text.lstrip() if slot.strip_left else text
            text = text.rstrip() if slot.strip_right else text
            if turns[number].role != "assistant":
                _write_literal(writer, before)
                writer.user(text)
                continue
            lead = " " if before.endswith(" ") else ""
            _write_literal(writer, before.removesuffix(" "))
            if not has_reasoning(turns[number]):
                writer.text(f"{lead}{text}", supervised=True)
                continue
            if slot.drops and number == len(turns) - 1:
                raise DataError(
                    f"the chat template of {tokenizer.name_or_path} leaves out what the last answer says before "
                    "</think>, so it would not be learnt. Take it out of the record, or choose another data.template."
                )
            stretches = split_reasoning(text)[1]
            words = (stretches[part] if isinstance(part, int) else part for part in slot.words)
            write_reasoning(writer, lead + "".join(words))
        trailing = _write_end(writer, layout.after, end)
        if _has_special(writer, end):
            _write_literal(writer, trailing)
        else:
            self.write_end(writer)
        return writer.pieces

    def opening(self, tokenizer: Any) -> tuple[str | None, bool]:
        """The system turn given to records that have none (None: no turn), and whether system texts are put in front of
        the first question because the template refuses system turns.
        """
        folded = _layout_of(tokenizer, (_SYSTEM, _USER, _ASSISTANT)).folded
        emptied = self.system == "" and _needs_empty_system(tokenizer)
        return "" if emptied else self.system or None, folded

    def write_end(self, writer: PieceWriter) -> None:
        end = _end_of(writer.tokenizer)
        if _has_special(writer, end):
            _write_literal(writer, end, supervised=True)
        elif writer.traits.eos:
            writer.special(writer.traits.eos, supervised=True)
        else:
            raise ConfigError(
                f"data.template: the chat template of {writer.tokenizer.name_or_path} ends answers without a special "
                "token and the tokenizer has no eos_token, so answers would never end. Choose another template."
            )


def _shape_of(turn: Turn) -> _Shape:
    return turn.role, split_reasoning(turn.text)[0] if has_reasoning(turn) else None


@functools.lru_cache(maxsize=1024)
def _layout_of(tokenizer: Any, shapes: tuple[_Shape, ...]) -> _Layout:
    from jinja2 import TemplateError

    try:
        return _render_marked(tokenizer, shapes, folded=False)
    except ConfigError as error:
        if shapes[0][0] != "system" or not isinstance(error.__cause__, TemplateError):
            raise
        return _render_marked(tokenizer, shapes[1:], folded=True)


def _render_marked(tokenizer: Any, shapes: tuple[_Shape, ...], *, folded: bool) -> _Layout:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"data.template: tokenizer {tokenizer.name_or_path} brings no chat template. Choose one of the others, "
            "for example chatml or v1."
        )
    roles = [role for role, _ in shapes]
    frames = [(_EDGE,) if frame is None else frame for _, frame in shapes]
    marks = [[_MARK.format(f"{n}n{i}") for i in range(len(frame))] for n, frame in enumerate(frames)]
    texts = [
        "".join(literal + mark for literal, mark in zip(frame, marked, strict=True)) + _EDGE * bool(frame)
        for frame, marked in zip(frames, marks, strict=True)
    ]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        rest = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # the template is a program; transformers runs it in a sandbox
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"data.template: the chat template of {tokenizer.name_or_path} fails for {'/'.join(roles)} ({reason}). Choose "
            "another template."
        ) from error
    slots = []
    for number, (_, frame) in enumerate(shapes):
        if not marks[number]:
            continue
        *reasoning, last = marks[number]
        if wrong := [count for mark in reasoning if (count := rest.count(mark)) > 1] or [
            count for count in [rest.count(last)] if count != 1
        ]:
            raise ConfigError(
                f"data.template: the chat template of {tokenizer.name_or_path} shows turn {number} of "
                f"{'/'.join(roles)} {wrong[0]} times instead of once, so no exact mask exists. Choose another "
                "template."
            )
        before, rest = rest.split(last)
        kept_left, kept_right = before.endswith(_EDGE), rest.startswith(_EDGE)
        slot = _Slot(before.removesuffix(_EDGE), not kept_left, not kept_right)
        if frame is not None:
            plain = _layout_of(tokenizer, tuple((role, None) for role in roles))
            slot = _reasoning_slot(slot, reasoning, plain.slots[number].before)
        slots.append(slot)
        rest = rest.removeprefix(_EDGE)
    return _Layout(tuple(slots), rest, folded)


def _reasoning_slot(slot: _Slot, reasoning: list[str], plain: str) -> _Slot:
    """The slot of an answer with reasoning, out of its last stretch's.

    Args:
        slot: with everything up to the last stretch in ``before``.
        reasoning: the marks of the other stretches.
        plain: what the template writes before an answer without reasoning.
    """
    shown = [number for number, mark in enumerate(reasoning) if mark in slot.before]
    before, *between = re.split("|".join(reasoning[number] for number in shown) or r"(?!)", slot.before)
    opening = before.rfind("<think>") if before != plain else -1
    begin = opening if opening >= 0 else len(before)
    words: list[int | str] = [before[begin:]]
    for number, text in zip(shown, between, strict=True):
        words += [number, text]
    words.append(len(reasoning))
    return replace(slot, before=before[:begin], words=tuple(words), drops=len(shown) < len(reasoning))


@functools.lru_cache(maxsize=16)
def _needs_empty_system(tokenizer: Any) -> bool:
    """Whether the template writes a system text of its own unless it is given an empty one.

    Of its own is what stands before the first question without being what stands around a given system text.

    Raises:
        ConfigError: it writes one even then.
    """
    given = _layout_of(tokenizer, (_SYSTEM, _USER, _ASSISTANT))
    if given.folded:
        return False
    head, rest = given.slots[0].before, given.slots[1].before
    written = ""
    for shapes in ((_USER, _ASSISTANT), (_EMPTY_SYSTEM, _USER, _ASSISTANT)):
        written = _layout_of(tokenizer, shapes).slots[0].before
        if any(head.startswith(written[:n]) and rest.endswith(written[n:]) for n in range(len(written) + 1)):
            return shapes[0] == _EMPTY_SYSTEM
    raise ConfigError(
        f'data.template.system: "", but the chat template of {tokenizer.name_or_path} writes a system text of its own for an '
        f"empty one, too ({written[:80]!r}). Give a system text, or choose another template, for example chatml."
    )


@functools.lru_cache(maxsize=16)
def _end_of(tokenizer: Any) -> str:
    """What the template writes after a last answer, up to and including the first special token."""
    after = _layout_of(tokenizer, (_USER, _ASSISTANT)).after
    found = _special_pattern(tokenizer).search(after)
    return after[: found.end()] if found else after


def _has_special(writer: PieceWriter, text: str) -> bool:
    return _special_pattern(writer.tokenizer).search(text) is not None


def _write_end(writer: PieceWriter, literal: str, end: str) -> str:
    """Write the part of ``literal`` that ends an answer, supervised; returns what is left of it."""
    if not end.strip() or not literal.startswith(end):
        return literal
    _write_literal(writer, end, supervised=True)
    return literal[len(end) :]


def _write_literal(writer: PieceWriter, literal: str, *, supervised: bool = False) -> None:
    """Write the template's own text; here special tokens are special tokens. Those that swallow the white space beside
    them (``lstrip``/``rstrip``, as Phi-3's do) swallow it here too.
    """
    flags = _strip_flags(writer.tokenizer)
    done = 0
    for found in _special_pattern(writer.tokenizer).finditer(literal):
        text = literal[done : found.start()]
        left, right = flags.get(found.group(), (False, False))
        writer.text(text.rstrip() if left else text, supervised=supervised)
        writer.special(found.group(), supervised=supervised)
        done = found.end()
        if right:
            done += len(literal) - done - len(literal[done:].lstrip())
    writer.text(literal[done:], supervised=supervised)


@functools.lru_cache(maxsize=16)
def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    names = sorted(traits_of(tokenizer).specials, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names) or r"(?!)")


@functools.lru_cache(maxsize=16)
def _strip_flags(tokenizer: Any) -> dict[str, tuple[bool, bool]]:
    tokens = tokenizer.added_tokens_decoder.values()
    return {token.content: (token.lstrip, token.rstrip) for token in tokens if token.lstrip or token.rstrip}
