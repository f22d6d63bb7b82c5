"""Visual dependence: how much of a dataset can be answered without looking.

*Ours.* ``blind`` of a record is the share of its answers that a guesser without a picture gives word for word; visual
dependence is 1 - blind. The offline guesser answers every question template with its most frequent answer, counted without
the record's own turn (leave one out), so that a question asked once is never "known". Any function of questions can take
its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlit.data.record import Record
from vlit.synth.quality.words import tokens

BlindModel = Callable[[Sequence[str]], Sequence[str]]
"""Questions (text only) -> answers, for example a language model without its picture."""


def blind_share(record: Record, guess: BlindModel) -> float:
    """Share of a record's answers that ``guess`` gives without the picture, compared as words; NaN without a turn."""
    questions = [turn.text.replace("<image>", "").strip() for turn in record.turns if turn.role == "user"]
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    if not answers:
        return float("nan")
    guesses = guess(questions)
    return sum(tokens(a) == tokens(b) for a, b in zip(guesses, answers, strict=True)) / len(answers)


def guessed_by_majority(templates: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """bool [turns]: the answer is the strictly most frequent of its template among all *other* turns.

    Args:
        templates, answers: hashes, uint64 [turns].
    """
    if not len(templates):
        return np.zeros(0, bool)
    order = np.lexsort((answers, templates))
    template, answer = templates[order], answers[order]
    new_template = np.r_[True, template[1:] != template[:-1]]
    new_pair = new_template | np.r_[True, answer[1:] != answer[:-1]]
    pair_of = np.cumsum(new_pair) - 1
    count = np.bincount(pair_of)
    owner = (np.cumsum(new_template) - 1)[new_pair]
    best = np.zeros(owner[-1] + 1, np.int64)
    np.maximum.at(best, owner, count)
    holds_best = np.bincount(owner, weights=count == best[owner], minlength=len(best))
    rank = np.lexsort((count, owner))
    second = np.zeros(len(best), np.int64)
    last = np.r_[owner[rank][1:] != owner[rank][:-1], True]
    ends = np.flatnonzero(last)
    has_two = np.r_[ends[:1] >= 1, np.diff(ends) >= 2] if len(ends) else np.zeros(0, bool)
    second[has_two] = count[rank][ends[has_two] - 1]
    others_best = np.where(holds_best[owner] > 1, best[owner], second[owner])
    known = (count == best[owner]) & (count - 1 > others_best)
    out = np.zeros(len(order), bool)
    out[order] = known[pair_of]
    return out
