"""Sample -> token ids and labels: every piece is encoded once, so ids and masks cannot disagree.

Truncation: whole exchanges are dropped from the end until the sample fits, with their images; if the first exchange
alone is too long, its answer loses its end token and its tail. An image is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlit.config.schema import DataConfig
from vlit.data.load_tokenizer import tokenizer_for
from vlit.data.templates._base import TemplateConfig
from vlit.data.text import Context, TextEncoder, encoder_of, traits_of
from vlit.data.vocabulary import check_vocabulary
from vlit.errors import DataError, ModelError
from vlit.types import IGNORE_INDEX, IMAGE_PLACEHOLDER, ModelSpec, Piece, Sample, TokenizedSample, Turn


class NoSupervision(DataError):
    """Nothing of a sample that the model should say fits into ``max_tokens``."""


class TokenView(NamedTuple):
    """One token as a preview shows it. An image is one entry of ``num_tokens``."""

    text: str
    token_id: int
    kind: str  # text, special or image
    supervised: bool
    num_tokens: int = 1


@dataclass(slots=True)
class _Encoded:
    """A rendered and truncated conversation."""

    pieces: list[Piece]
    contexts: list[Context]
    ids: list[list[int]]  # per piece; [] for images
    num_turns: int  # turns of the sample that are left
    num_images: int
    num_tokens: int
    dropped_turns: int = 0
    cut_tokens: int = 0

    def keep(self, num_pieces: int) -> None:
        """Drop all pieces after the first ``num_pieces``."""
        self.pieces = self.pieces[:num_pieces]
        self.contexts = self.contexts[:num_pieces]
        self.ids = self.ids[:num_pieces]

    def num_supervised(self) -> int:
        """Supervised tokens that have a token before them to be predicted from."""
        count = sum(len(ids) for piece, ids in zip(self.pieces, self.ids, strict=True) if piece.supervised)
        return count - (1 if count and self.pieces[0].supervised else 0)


class SampleTokenizer:
    """Tokenizes samples for one model and one set of data rules; picklable, loads its tokenizer on first use.

    Args:
        spec: the model; decides tokenizer and tokens an image takes.
        data: template and ``max_tokens``.
    """

    def __init__(self, spec: ModelSpec, data: DataConfig) -> None:
        self.spec = spec
        self.max_tokens = data.max_tokens
        self.template: TemplateConfig = data.template
        if not isinstance(self.template, TemplateConfig):
            raise DataError(
                f"data.template: {type(self.template).__name__} is not a template; derive it from TemplateConfig."
            )

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer (cached per process)."""
        spec = self.spec
        tokenizer = tokenizer_for(
            spec.tokenizer_path, trust_remote_code=spec.trust_remote_code, revision=spec.tokenizer_revision
        )
        if spec.vocab_size is not None:
            check_vocabulary(tokenizer, spec.vocab_size, spec.tokenizer_path)
        return tokenizer

    @property
    def encoder(self) -> TextEncoder:
        """Encodes ordinary text (cached per process)."""
        return encoder_of(self.tokenizer)

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Ids, labels aligned to the next token, and the images that are left after truncation.

        Raises:
            DataError: no supervised token fits into ``max_tokens``, or the template cannot hold the turns.
        """
        encoded = self._fit(sample)
        return self._assemble(
            encoded, sample_id=sample.id, source=sample.source, images=sample.images, kind=sample.kind
        )

    def prompt(
        self, turns: Sequence[Turn], images: Sequence[str] = (), *, id: str = "", source: str = ""
    ) -> TokenizedSample:
        """A conversation that ends with the user's turn, followed by what stands before an answer; no labels. Nothing
        is truncated: compare ``len`` with the model's context.
        """
        pieces = self.template.render(turns, tokenizer=self.tokenizer, generation_prompt=True)
        encoded = self._encode(pieces, num_turns=len(turns))
        if encoded.num_images != len(images):
            raise DataError(
                f"the prompt has {encoded.num_images} {IMAGE_PLACEHOLDER} placeholders and {len(images)} images. "
                "Write one placeholder an image."
            )
        return self._assemble(encoded, sample_id=id, source=source, images=tuple(images), kind=None)

    def explain(self, sample: Sample) -> list[TokenView]:
        """The tokens of :meth:`tokenize` with the characters each stands for; for previews. Texts concatenate to the
        rendered conversation.
        """
        encoded = self._fit(sample)
        views: list[TokenView] = []
        for piece, context, ids in zip(encoded.pieces, encoded.contexts, encoded.ids, strict=True):
            if piece.kind == "image":
                views.append(TokenView(IMAGE_PLACEHOLDER, 0, "image", False, self.spec.tokens_per_view))
            elif piece.kind == "special":
                views.append(TokenView(piece.text, ids[0], "special", piece.supervised))
            else:
                shown = self.encoder.encode_with_text(piece.text, context)[: len(ids)]
                views += [TokenView(text, token_id, "text", piece.supervised) for token_id, text in shown]
        return views

    def stop_sequences(self) -> list[list[int]]:
        """Token sequences that end an answer: the template's end and the tokenizer's own end token."""
        end = self.template.end(self.tokenizer)
        specials = [traits_of(self.tokenizer).specials[piece.text] for piece in end if piece.kind == "special"]
        stops = [[token_id] for token_id in specials[:1]]
        if not specials:
            text = "".join(piece.text for piece in end)
            stops = [ids] if (ids := self.encoder.encode(text, "text")) else []
        eos = self.tokenizer.eos_token_id
        if eos is not None and [eos] not in stops:
            stops.append([int(eos)])
        return stops

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids without special tokens and without the space that leads an answer."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[1:] if text.startswith(" ") else text

    def written_as_text(self) -> tuple[str, ...]:
        """Special tokens of the template that this tokenizer does not have; they are written as ordinary text."""
        return tuple(token for token in self.template.specials if token not in traits_of(self.tokenizer).specials)

    def _fit(self, sample: Sample) -> _Encoded:
        """Render with as many exchanges as fit. The length grows with them, so their number is found by bisection."""
        first = 1 if sample.turns and sample.turns[0].role == "system" else 0
        num_exchanges = (len(sample.turns) - first) // 2
        cache: dict[tuple[str, Context], list[int]] = {}

        def encode(count: int) -> _Encoded:
            turns = sample.turns[: first + 2 * count]
            return self._encode(
                self.template.render(turns, tokenizer=self.tokenizer), num_turns=len(turns), cache=cache
            )

        encoded = encode(max(num_exchanges, 1))
        if encoded.num_images != len(sample.images) and encoded.num_tokens <= self.max_tokens:
            raise DataError(
                f"the text has {encoded.num_images} {IMAGE_PLACEHOLDER} placeholders, the sample lists "
                f"{len(sample.images)} images. Write one placeholder an image."
            )
        if encoded.num_tokens > self.max_tokens:
            low, high = 1, num_exchanges  # low is kept even if too long, high is too long
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if encode(middle).num_tokens <= self.max_tokens else (low, middle)
            encoded = encode(low)
            encoded.dropped_turns = len(sample.turns) - encoded.num_turns
            if encoded.num_tokens > self.max_tokens:
                self._cut_answer(encoded)
        if encoded.num_supervised() == 0:
            raise NoSupervision(
                f"no supervised token is left within max_tokens {self.max_tokens} (the question alone takes "
                f"{encoded.num_tokens}, {encoded.num_images * self.spec.tokens_per_view} of them for "
                f"{encoded.num_images} image{'s' * (encoded.num_images != 1)}). Shorten the question, or raise "
                "data.max_tokens"
            )
        return encoded

    def _cut_answer(self, encoded: _Encoded) -> None:
        """Cut what follows the only answer, then its end, then its tail, until ``max_tokens`` are left."""
        before = encoded.num_tokens
        supervised = [place for place, piece in enumerate(encoded.pieces) if piece.supervised]
        if not supervised:
            return
        encoded.keep(supervised[-1] + 1)
        encoded.num_tokens = self._length(encoded)
        if encoded.num_tokens > self.max_tokens:
            encoded.keep(supervised[0] + 1)
            surplus = self._length(encoded) - self.max_tokens
            answer = encoded.ids[-1]
            encoded.ids[-1] = answer[: max(0, len(answer) - max(0, surplus))]
            encoded.num_tokens = self._length(encoded)
        encoded.cut_tokens = before - encoded.num_tokens

    def _special(self, token: str, token_id: int) -> int:
        """``token_id``; ModelError when the language model has no embedding for this token of the template."""
        size = self.spec.vocab_size
        if size is not None and token_id >= size:
            raise ModelError(
                f"data.template {self.template.type}: its token {token!r} has the id {token_id} in the tokenizer "
                f'"{self.spec.tokenizer_path}", the language model has {size} embeddings (its vocab_size). Set '
                "data.template to one made for this model, or model.llm.tokenizer to the model's own."
            )
        return token_id

    def _length(self, encoded: _Encoded) -> int:
        pairs = zip(encoded.pieces, encoded.ids, strict=True)
        return sum(self.spec.tokens_per_view if piece.kind == "image" else len(ids) for piece, ids in pairs)

    def _encode(
        self, pieces: list[Piece], *, num_turns: int, cache: dict[tuple[str, Context], list[int]] | None = None
    ) -> _Encoded:
        cache = {} if cache is None else cache
        specials, bos = traits_of(self.tokenizer).specials, traits_of(self.tokenizer).bos
        encoder = self.encoder
        context: Context = "start"
        contexts: list[Context] = []
        all_ids: list[list[int]] = []
        num_images = 0
        for position, piece in enumerate(pieces):
            contexts.append(context)
            if piece.kind == "image":
                all_ids.append([])
                num_images += 1
                context = "start"
            elif piece.kind == "special":
                all_ids.append([self._special(piece.text, specials[piece.text])])
                begins = position == 0 and piece.text == bos and not self.template.inline_bos
                context = "start" if begins else "special"
            else:
                key = (piece.text, context)
                if key not in cache:
                    cache[key] = encoder.encode(*key)
                all_ids.append(cache[key])
                context = "text"
        encoded = _Encoded(pieces, contexts, all_ids, num_turns, num_images, 0)
        encoded.num_tokens = self._length(encoded)
        return encoded

    def _assemble(
        self, encoded: _Encoded, *, sample_id: str, source: str, images: tuple[str, ...], kind: str | None
    ) -> TokenizedSample:
        length = encoded.num_tokens
        input_ids = np.zeros(length, np.int64)
        supervised = np.zeros(length, bool)
        is_image = np.zeros(length, bool)
        kept_images = []
        begin = 0
        for piece, ids in zip(encoded.pieces, encoded.ids, strict=True):
            end = begin + (self.spec.tokens_per_view if piece.kind == "image" else len(ids))
            if piece.kind == "image":
                is_image[begin:end] = True
                kept_images.append(images[piece.image])
            else:
                input_ids[begin:end] = ids
                supervised[begin:end] = piece.supervised
            begin = end
        labels = np.full(length, IGNORE_INDEX, np.int64)
        labels[:-1][supervised[1:]] = input_ids[1:][supervised[1:]]
        return TokenizedSample(
            id=sample_id,
            source=source,
            input_ids=input_ids,
            labels=labels,
            is_image=is_image,
            images=tuple(kept_images),
            kind=kind,
            dropped_turns=encoded.dropped_turns,
            cut_tokens=encoded.cut_tokens,
        )
