"""The records of each measured case: token ids drawn from a seed, lengths like those of the datasets LLaVA is trained on.

| case         | one record                                                                   | trained         |
|--------------|------------------------------------------------------------------------------|-----------------|
| stage1       | BOS, image, caption (mean 20 tokens, all supervised)                         | connector       |
| stage2       | header of 35 tokens, image, then questions of 12-20 tokens and answers; text | connector + LLM |
|              | mean 216 tokens with header, about 70 % of the rest supervised (the answers) |                 |
| shared_image | header, image, one question (mean 20), one answer (mean 26, supervised);     | connector + LLM |
|              | six records show the same image                                              |                 |

Lengths are log-normal. The header is the same in every record, as a system prompt is. An image is random pixels. The last
word of the vocabulary never occurs: systems that mark image positions by a token id use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.models import Size
from vlit.types import IGNORE_INDEX, TokenizedSample

BOS, FIRST_WORD = 1, 3
HEADER_TOKENS = 35
MAX_TOKENS = 2048
DEFAULT_BATCH = {"tiny": (4, 12), "small": (16, 48), "7b": (8, 12)}
"""Default records of a step by model size: with an image of their own, with a shared one."""


@dataclass(frozen=True)
class Case:
    """What is trained, and on what."""

    name: str
    tuning: dict[str, str]
    lr: float
    records_per_image: int = 1

    def default_batch(self, size: str) -> int:
        """Records of a step."""
        return DEFAULT_BATCH[size][self.records_per_image > 1]


CASES = {
    case.name: case
    for case in (
        Case("stage1", {"connector": "full"}, 1e-3),
        Case("stage2", {"connector": "full", "llm": "full"}, 2e-5),
        Case("shared_image", {"connector": "full", "llm": "full"}, 2e-5, records_per_image=6),
    )
}


@dataclass(frozen=True)
class Records:
    """The records of one step; ``pixels`` are uint8 ``[3, H, W]`` by the name a sample's ``images`` holds."""

    samples: list[TokenizedSample]
    pixels: dict[str, np.ndarray]

    @property
    def num_tokens(self) -> int:
        """Tokens of the records themselves: an image counts in every record that shows it, padding never."""
        return sum(len(sample) for sample in self.samples)

    @property
    def num_label_tokens(self) -> int:
        return sum(sample.num_label_tokens for sample in self.samples)


def make_records(case: Case, size: Size, num_records: int, seed: int = 0) -> Records:
    """``num_records`` records of ``case``; the same ones for the same arguments."""
    rng = np.random.default_rng(seed)
    header = _words(rng, HEADER_TOKENS, size)
    header[0] = BOS
    samples: list[TokenizedSample] = []
    pixels: dict[str, np.ndarray] = {}
    for number in range(num_records):
        image = f"{number // case.records_per_image}.jpg"
        if image not in pixels:
            pixels[image] = rng.integers(0, 256, (3, size.image_size, size.image_size), np.uint8)
        before, turns = _text(rng, case, size, header)
        samples.append(_sample(f"{case.name}-{number}", before, turns, image, size))
    return Records(samples, pixels)


def _text(
    rng: np.random.Generator, case: Case, size: Size, header: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, bool]]]:
    """Ids before the image, and what follows it: runs of ids, each supervised or not."""
    if case.name == "stage1":
        return header[:1], [(_words(rng, _length(rng, 20, 0.4), size), True)]
    if case.name == "shared_image":
        question, answer = _length(rng, 20, 0.4), _length(rng, 26, 0.5)
        return header, [(_words(rng, question, size), False), (_words(rng, answer, size), True)]
    text = min(_length(rng, 216, 0.5), MAX_TOKENS - size.image_tokens)
    body = max(text - HEADER_TOKENS, 24)
    questions = rng.integers(12, 21, max(1, round(0.3 * body / 16)))
    questions = questions[: max(1, (body - 4) // 21)]  # short records: room for an answer after each question
    share = rng.dirichlet(np.full(len(questions), 4.0)) * (body - questions.sum() - len(questions))
    answers = np.diff(np.round(np.cumsum(share)), prepend=0).astype(int) + 1
    turns: list[tuple[np.ndarray, bool]] = []
    for question, answer in zip(questions.tolist(), answers.tolist(), strict=True):
        turns += [(_words(rng, question, size), False), (_words(rng, answer, size), True)]
    return header, turns


def _sample(
    name: str, before: np.ndarray, turns: list[tuple[np.ndarray, bool]], image: str, size: Size
) -> TokenizedSample:
    ids = np.concatenate([before, np.zeros(size.image_tokens, np.int64), *(words for words, _ in turns)])
    is_image = np.zeros(len(ids), bool)
    is_image[len(before) : len(before) + size.image_tokens] = True
    supervised = np.zeros(len(ids), bool)
    place = len(before) + size.image_tokens
    for words, taught in turns:
        supervised[place : place + len(words)] = taught
        place += len(words)
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    labels[:-1][supervised[1:]] = ids[1:][supervised[1:]]
    return TokenizedSample(name, "benchmark", ids, labels, is_image, (image,))


def _words(rng: np.random.Generator, count: int, size: Size) -> np.ndarray:
    return rng.integers(FIRST_WORD, size.vocabulary - 1, count, np.int64)


def _length(rng: np.random.Generator, mean: float, sigma: float) -> int:
    """Log-normal with the given mean, at least 4."""
    return max(4, round(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma)))
