"""Figures of published systems, as published.

- Sensitivity (MultiInstruct, arXiv:2212.10773 §5): how much a model's score moves with the wording of the instruction.
- Meta Quality, Dataset Quality, Sample Quality (REVO-LION, arXiv:2309.10527): how well a model tuned on one dataset does on
  others.

Both need a model's scores; these functions take scores. BLEU and ROUGE-L are given for REVO-LION. Its third part, METEOR,
needs WordNet's synonyms: here it matches exact words and base forms only (a deviation), with METEOR's published constants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlit.synth.quality.words import lemma, tokens


def sensitivity(scores: Mapping[str, Sequence[float]]) -> float:
    """``E_t[ sigma_i(score) / mu_i(score) ]``: mean over tasks of the coefficient of variation over instructions.

    Args:
        scores: for each task the mean score under each of its instructions. Lower is better; a task of mean 0 is left out.
    """
    ratios = [float(np.std(values) / np.mean(values)) for values in scores.values() if np.mean(values)]
    return float(np.mean(ratios)) if ratios else float("nan")


def meta_quality(bleu: float, meteor: float, rouge_l: float) -> float:
    """``MQ = (BLEU + METEOR + ROUGE-L) / 3`` of a model tuned on one dataset, on samples of another."""
    return (bleu + meteor + rouge_l) / 3


def dataset_quality(quality: np.ndarray) -> np.ndarray:
    """``DQ`` of each dataset: mean of its row of MQ [tuned on, evaluated on], all pairs of tuning and evaluation."""
    return np.nanmean(quality, axis=1)


def sample_quality(quality: np.ndarray) -> np.ndarray:
    """``SQ`` of each sample: mean over the tuned models of MQ [tuned on, sample]. The upper half is what REVO-LION keeps."""
    return np.nanmean(quality, axis=0)


def keep_upper_half(samples: np.ndarray) -> np.ndarray:
    """bool [N]: samples of at least median SQ."""
    return samples >= np.median(samples)


def bleu(said: str, reference: str, *, order: int = 4) -> float:
    """Sentence BLEU (Papineni et al. 2002) up to 4-grams, add-one smoothing above unigrams (Lin and Och 2004)."""
    a, b = tokens(said), tokens(reference)
    if not a or not b:
        return 0.0
    logs = 0.0
    for size in range(1, order + 1):
        left, right = (Counter(tuple(w[i : i + size]) for i in range(len(w) - size + 1)) for w in (a, b))
        hits, total = sum((left & right).values()), sum(left.values())
        if size > 1:
            hits, total = hits + 1, total + 1
        if not hits:
            return 0.0
        logs += math.log(hits / total)
    return min(1.0, math.exp(1 - len(b) / len(a))) * math.exp(logs / order)


def rouge_l(said: str, reference: str, *, beta: float = 1.2) -> float:
    """ROUGE-L (Lin 2004): F measure of the longest common subsequence; beta 1.2 as in caption evaluation."""
    a, b = tokens(said), tokens(reference)
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for at, other in enumerate(b, start=1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(a), row[-1] / len(b)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def meteor(said: str, reference: str) -> float:
    """METEOR (Banerjee and Lavie 2005) without synonyms: ``10PR / (R + 9P) * (1 - 0.5 (chunks / matches)^3)``."""
    a, b = [lemma(word) for word in tokens(said)], [lemma(word) for word in tokens(reference)]
    free: dict[str, list[int]] = {}
    for place, word in enumerate(b):
        free.setdefault(word, []).append(place)
    places = [free[word].pop(0) if free.get(word) else -1 for word in a]
    matches = sum(place >= 0 for place in places)
    if not matches:
        return 0.0
    chunks = sum(
        place >= 0 and (at == 0 or places[at - 1] < 0 or place != places[at - 1] + 1) for at, place in enumerate(places)
    )
    precision, recall = matches / len(a), matches / len(b)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)
