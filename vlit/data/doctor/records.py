"""Rows of an index in bulk, and what tokenising a record says about it.

Most records need no tokenising: a piece of ASCII text cannot give more tokens than a small multiple of its length, so a
record whose upper bound is within ``max_tokens`` loses nothing, and an answer that is not empty gives at least one token.
Both are read off the tokenizer itself, character by character. Everything else (other scripts may be normalised into
longer text, long records) is tokenised exactly as training does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from vlit.data.doctor.checks import Finding
from vlit.data.index import ArrowRows
from vlit.data.tokenize import NoSupervision, SampleTokenizer
from vlit.errors import DataError
from vlit.types import Sample, Turn

_ASCII = [chr(code) for code in range(32, 127)]


@dataclass(frozen=True)
class Rows(Sequence[int]):
    """Rows ``start … stop - 1`` of a dataset's index; a task that can be cut."""

    dataset: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            first, last, _ = place.indices(len(self))
            return Rows(self.dataset, self.start + first, self.start + max(first, last))
        return self.start + place


def read_samples(table: Any, start: int, stop: int, source: str) -> Iterator[Sample]:
    """The samples of some rows of :meth:`ArrowRows.table`, without a Python object a value until one is needed."""
    part = table.slice(start, stop - start).combine_chunks()
    columns = {name: part.column(name).chunk(0) for name in ("id", "kind", "images", "turns")}
    turns = columns["turns"].flatten()
    roles, texts = turns.field("role").to_pylist(), turns.field("text").to_pylist()
    images = columns["images"].flatten().to_pylist()
    num_turns, num_images = (columns[name].value_lengths().to_pylist() for name in ("turns", "images"))
    turn, image = 0, 0
    for row, (name, kind) in enumerate(zip(columns["id"].to_pylist(), columns["kind"].to_pylist(), strict=True)):
        last_turn, last_image = turn + num_turns[row], image + num_images[row]
        both = zip(roles[turn:last_turn], texts[turn:last_turn], strict=True)
        yield Sample(
            id=name,
            source=source,
            turns=tuple(Turn(role, text) for role, text in both),
            images=tuple(images[image:last_image]),
            kind=kind,
        )
        turn, image = last_turn, last_image


def content_of(sample: Sample) -> bytes:
    """All that training sees of a record, as bytes: equal for two records with the same turns, images and kind."""
    return orjson.dumps([sample.kind, sample.images, [[turn.role, turn.text] for turn in sample.turns]])


def content_key(sample: Sample) -> int:
    """63 bits of a hash of :func:`content_of`; equal keys are compared in full before anything is said."""
    return int.from_bytes(hashlib.blake2b(content_of(sample), digest_size=8).digest(), "little") >> 1


@dataclass
class RecordJob:
    """Looks at the records of :class:`Rows`. ``end`` gives their :func:`content_key`, int64 [rows]."""

    indexes: list[str]
    """The Arrow file of each dataset."""
    tokenizers: list[SampleTokenizer]
    _tables: dict[int, Any] = field(default_factory=dict)
    _bounds: dict[int, LengthBound] = field(default_factory=dict)
    _keys: list[int] = field(default_factory=list)
    _dataset: int = 0

    def start(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def begin(self, task: Rows) -> Iterator[Sample]:
        self._dataset, self._keys = task.dataset, []
        if task.dataset not in self._tables:
            self._tables[task.dataset] = ArrowRows(self.indexes[task.dataset]).table()
            self._bounds[task.dataset] = LengthBound(self.tokenizers[task.dataset])
        return read_samples(self._tables[task.dataset], task.start, task.stop, "")

    def look(self, sample: Sample) -> list[Finding]:
        self._keys.append(content_key(sample))
        tokenizer = self.tokenizers[self._dataset]
        try:
            if self._bounds[self._dataset].surely_fits(sample):
                return []
            tokens = tokenizer.tokenize(sample)
        except NoSupervision as error:
            return [Finding("no_supervision", str(error))]
        except DataError as error:
            return [Finding("template", str(error).rstrip("."))]
        findings = []
        if tokens.dropped_turns:
            words = (
                f"{tokens.dropped_turns} of {len(sample.turns)} turns do not fit into max_tokens {tokenizer.max_tokens}"
            )
            findings.append(Finding("drops_turns", words))
        if tokens.cut_tokens:
            words = f"{tokens.cut_tokens} tokens of the answer do not fit into max_tokens {tokenizer.max_tokens}"
            findings.append(Finding("cuts_answer", words))
        return findings

    def end(self) -> np.ndarray:
        return np.array(self._keys, np.int64)


class LengthBound:
    """Says of a record, without tokenising it, that it surely fits and has something to learn; or that it does not know."""

    def __init__(self, tokenizer: SampleTokenizer) -> None:
        self._tokenizer = tokenizer
        encode = tokenizer.encoder.encode
        lengths = [len(encode(character, "text")) for character in [*_ASCII, "\n", "\t", "\r"]]
        self._per_character = max(lengths)
        self._lead = len(encode("a", "start")) + len(encode("a", "special"))
        self._applies = min(lengths[1 : len(_ASCII)]) > 0  # every visible character gives a token

    def surely_fits(self, sample: Sample) -> bool:
        """True: no turn is dropped, no token cut, and a token is supervised. False: tokenise to know.

        Raises:
            DataError: the template cannot hold the turns.
        """
        if not self._applies:
            return False
        room = self._tokenizer.max_tokens
        pieces = self._tokenizer.template.render(sample.turns, tokenizer=self._tokenizer.tokenizer)
        supervised = -1 if pieces and pieces[0].supervised else 0  # nothing stands before the first token to predict it
        for piece in pieces:
            if piece.kind == "image":
                room -= self._tokenizer.spec.tokens_per_view
            elif piece.kind == "special":
                room -= 1
                supervised += piece.supervised
            elif not piece.text.isascii():
                return False
            else:
                room -= self._lead + self._per_character * len(piece.text)
                supervised += piece.supervised and not piece.text.isspace()
            if room < 0:
                return False
        return supervised > 0
