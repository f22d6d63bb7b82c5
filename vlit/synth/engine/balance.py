"""Concept balancing of captions, as LLaVA made 595 K pairs of CC3M (arXiv:2304.08485 appendix).

Noun phrases of every caption are counted; phrases rarer than ``min_count`` are no concepts. Phrases are visited rarest
first; for each, captions that hold it are added, a random ``max_per_phrase`` of them where there are more. A picture is
taken once.

The paper finds noun phrases with spaCy. To need no tagger, a phrase here is a chunk: the longest run of words between function
words, common verbs and punctuation, at most three words.
It knows no parts of speech, so some chunks are no noun phrases; counting and cutting by frequency is unharmed.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

MAX_WORDS = 3
_STOP_TEXT = (
    "a an the this that these those some any each every no of in on at by to from with without into onto over under "
    "above below beside behind between near next through across along around against for and or but as while when "
    "where which who whose it its his her their my your our he she they we you i him them is are was were be been "
    "being am has have had do does did can could will would there here up down out off very two three four five six "
    "seven eight nine ten one several many other another all both picture image photo photograph show shows showing "
    "see seen stands standing sits sitting holds holding wearing looking lying walking riding top-left top-right "
    "bottom-left bottom-right left right middle top bottom front back side"
)
STOP = frozenset(_STOP_TEXT.split())


def noun_phrases(caption: str) -> list[str]:
    """Chunks of a caption in lower case, each once, in order."""
    phrases: list[str] = []
    run: list[str] = []
    for word in [*re.findall(r"[\w'-]+|[.,;:!?]", caption.lower()), "."]:
        if word in STOP or not re.match(r"\w", word):
            if run:
                phrases.append(" ".join(run[-MAX_WORDS:]))
            run = []
        else:
            run.append(word)
    return list(dict.fromkeys(phrases))


def balance(captions: Sequence[str], *, min_count: int = 3, max_per_phrase: int = 100, seed: int = 0) -> list[int]:
    """Numbers of the captions that are kept, ascending. Deterministic."""
    holders: dict[str, list[int]] = defaultdict(list)
    for number, caption in enumerate(captions):
        for phrase in noun_phrases(caption):
            holders[phrase].append(number)
    counts = Counter({phrase: len(numbers) for phrase, numbers in holders.items()})
    rng = random.Random(f"{seed}:balance")
    kept: set[int] = set()
    for phrase, count in sorted(counts.items(), key=lambda pair: (pair[1], pair[0])):
        if count < min_count:
            continue
        numbers = holders[phrase]
        kept.update(numbers if count <= max_per_phrase else rng.sample(numbers, max_per_phrase))
    return sorted(kept)
