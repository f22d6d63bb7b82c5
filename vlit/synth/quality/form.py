"""Sentences of a question that ask for a form of answer: "Answer the question using a single word or phrase."

They stand behind every question of a dataset and say nothing about a picture, so their words count neither when records are
compared nor as text of an evaluation set; which form is wanted does, a word and a sentence being two answers. Such a sentence
consists of a closed set of words; the readers of formats, the recipes and the embedded world use no others (a test holds them
to it). What another dataset asks with other words stays content.
"""

from __future__ import annotations

import re
from functools import lru_cache

from vlit.synth.quality.words import TOKEN, word_set

_WORDS = word_set(
    """a all alone an and answer answering answers are as at be below brief briefly by choice choices choose close closely
    complete conclude concise conclusion correct describe detail directly do doing each end exactly explain few first
    following for form from full give given how image in is it its judge just keep letter letters look no of on one only
    option option's options or out output phrase phrases picture please provide question reason reasoning reply respond rests
    right say see select sentence sentences short should simple single so step that the them then there this to true two use
    using verdict way what which will with without word words write yes you your"""
)
_STARTS = word_set(
    "a answer choose describe explain give judge keep look output please provide reason reply respond say select use write"
)
_FORMS = word_set(
    """answer answers briefly choice choices letter letters option options option's phrase phrases reasoning reply respond
    sentence sentences verdict word words yes"""
)
_WHOLE = frozenset(
    {"is this right", "is this true", "is this correct", "which option is right", "which option is correct"}
)
_HINT = re.compile(rf"\b(?:{'|'.join(sorted({*_FORMS, 'right', 'true', 'correct'}))})\b")
"""A word that every such sentence has."""
_SENTENCE = re.compile(r"[^.?!\n]*[.?!]*\n?")


_KINDS = (
    ("letter", word_set("letter letters option options option's choice choices")),
    ("judgement", word_set("yes verdict true correct right")),
    ("short", word_set("word words phrase phrases short brief briefly")),
)


@lru_cache(maxsize=256)
def forms_of(question: str) -> frozenset[str]:
    """Forms of answer that a question asks for: letter, judgement, short, long."""
    if not _HINT.search(question.lower()):
        return frozenset()
    asked = [TOKEN.findall(part.lower()) for part in _SENTENCE.findall(question) if asks_for_form(part)]
    return frozenset(next((kind for kind, known in _KINDS if not known.isdisjoint(words)), "long") for words in asked)


@lru_cache(maxsize=256)
def without_form(question: str) -> str:
    """A question without its sentences about the form of the answer; as it is where nothing else would be left."""
    if not _HINT.search(question.lower()):
        return question
    kept = "".join(part for part in _SENTENCE.findall(question) if not asks_for_form(part))
    return kept if TOKEN.search(kept.replace("<image>", "")) else question


@lru_cache(maxsize=1 << 12)
def asks_for_form(sentence: str) -> bool:
    """Whether a sentence asks for a form of answer and for nothing else."""
    words = TOKEN.findall(sentence.lower().replace("’", "'"))
    if " ".join(words) in _WHOLE:
        return True
    return bool(words) and words[0] in _STARTS and _WORDS.issuperset(words) and not _FORMS.isdisjoint(words)
