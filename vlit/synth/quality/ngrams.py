"""Runs of words: how many different ones a dataset has, and which it shares with evaluation sets."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from vlit.synth.quality.sketches import Distinct, hash_text, ngram_hashes

CONTAMINATION_WORDS = 13
"""Length of the word sequences that must not be shared with an evaluation set (GPT-3, arXiv:2005.14165 App. C)."""
MAX_WORDS = 1 << 16
"""Of one turn that are looked at."""


class Said:
    """Hashed words of all turns of a chunk, one after another, with the turn of each word and the record of each turn."""

    def __init__(self) -> None:
        self.words, self.turns, self.owners = array("Q"), array("q"), array("q")
        self.owner = 0

    def add(self, words: Sequence[str]) -> None:
        """Take in one turn."""
        kept = words[:MAX_WORDS]
        self.words.extend([_hash(word) for word in kept])
        self.turns.extend([len(self.owners)] * len(kept))
        self.owners.append(self.owner)


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """uint64 hash of each word."""
    return np.array([_hash(word) for word in words], np.uint64)


_KNOWN: dict[str, int] = {}


def _hash(word: str) -> int:
    value = _KNOWN.get(word)
    if value is None:
        if len(_KNOWN) > 1 << 18:
            _KNOWN.clear()
        value = _KNOWN[word] = hash_text(word)
    return value


def distinct_ngrams(said: Said) -> list[tuple[int, np.ndarray]]:
    """Number of 1-, 2- and 3-grams, each with the registers of a count of different ones."""
    hashes, turns = np.frombuffer(said.words, np.uint64), np.frombuffer(said.turns, np.int64)
    found = []
    for size in (1, 2, 3):
        counter = Distinct()
        grams, _ = _within_turns(hashes, turns, size)
        counter.add(grams)
        found.append((len(grams), counter.registers))
    return found


def known_sequences(said: Said, known: np.ndarray, *, records: int) -> list[float]:
    """How many word sequences of each record are among the sorted hashes of evaluation sets."""
    hashes, turns = np.frombuffer(said.words, np.uint64), np.frombuffer(said.turns, np.int64)
    grams, turn = _within_turns(hashes, turns, CONTAMINATION_WORDS)
    if not len(grams) or not len(known):
        return [0.0] * records
    place = np.searchsorted(known, grams).clip(max=len(known) - 1)
    owners = np.frombuffer(said.owners, np.int64)[turn[known[place] == grams]]
    return np.bincount(owners, minlength=records).astype(float).tolist()


def _within_turns(hashes: np.ndarray, turns: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the runs of ``size`` words that lie in one turn, and the turns they lie in."""
    grams = ngram_hashes(hashes, size)
    inside = turns[: len(grams)] == turns[size - 1 :][: len(grams)]
    return grams[inside], turns[: len(grams)][inside]
