"""Questions in, answers out: the model together with the very template, images and tokenizer it was trained with.

Training's sample answers, evaluation, chat and the server all go through here, so they cannot differ in preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlit.config.schema import DataConfig
from vlit.data.images import load_view
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.models.assemble import VisionLanguageModel
from vlit.models.generate import Prompt, generate_ids
from vlit.types import IMAGE_PLACEHOLDER, Turn


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation that ends with a user turn; ``images`` are files in the order of the placeholders."""

    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()


class Completion(NamedTuple):
    """An answer; ``is_cut``: it has ``max_new_tokens`` and its end is not among them."""

    text: str
    is_cut: bool


def ask(question: str, images: Sequence[str | Path] = ()) -> Request:
    """A one-turn request; images the question does not mention come first, one line each, as LLaVA puts them."""
    missing = len(images) - question.count(IMAGE_PLACEHOLDER)
    if missing < 0:
        raise DataError(
            f"the question has {len(images) - missing} {IMAGE_PLACEHOLDER} placeholders, but {len(images)} images were given."
        )
    text = f"{IMAGE_PLACEHOLDER}\n" * missing + question
    return Request((Turn("user", text),), tuple(Path(p) for p in images))


class Answerer:
    """Greedy (or sampled) answers, in batches sorted by length."""

    def __init__(self, model: VisionLanguageModel, data: DataConfig, *, max_new_tokens: int = 64) -> None:
        self.model, self.data, self.max_new_tokens = model, data, max_new_tokens
        self.tokenizer = SampleTokenizer(model.spec, data)

    def prompt(self, request: Request) -> Prompt:
        """Token ids and pixels of a request."""
        tokens = self.tokenizer.prompt(request.turns, images=tuple(str(p) for p in request.images))
        spec = self.model.spec
        data = self.data
        loaded = [load_view(p, policy=data.image_policy, spec=spec, exact=data.exact_pixels) for p in request.images]
        views = [torch.from_numpy(view) for view in loaded]
        empty = torch.zeros(0, 3, spec.image_size, spec.image_size, dtype=torch.uint8)
        return Prompt(
            input_ids=torch.from_numpy(tokens.input_ids),
            is_image=torch.from_numpy(tokens.is_image),
            pixels=torch.stack(views) if views else empty,
        )

    def answers(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        streamer: Any = None,
    ) -> list[Completion]:
        """Answers in the order of the requests, and whether each came to its end."""
        prompts = [self.prompt(request) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids))
        stop = self.tokenizer.stop_sequences()
        found: dict[int, Completion] = {}
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            ids = generate_ids(
                self.model,
                [prompts[i] for i in members],
                max_new_tokens=self.max_new_tokens,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                streamer=streamer,
            )
            for i, row in zip(members, ids, strict=True):
                found[i] = Completion(self.tokenizer.decode(row).strip(), is_cut=len(row) >= self.max_new_tokens)
        return [found[i] for i in range(len(requests))]
