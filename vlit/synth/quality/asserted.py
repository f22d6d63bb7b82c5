"""What a sentence asserts about its picture: possibilities, conditions, comparisons, depictions and quotations are left out.

"The people may be waiting for a bus" claims no bus, "as big as a bear" no bear, "a shirt with a picture of a cat" no cat. Lists
of words, no parser: what is left out too much is a claim missed, not one invented.
"""

from __future__ import annotations

import re

_QUOTED = re.compile(r"[\"“][^\"“”]*[\"”]|(?<!\w)['‘][^'‘’]+['’](?!\w)")
_SHORT = re.compile(r"['’](?:ll|d)\b")
_OPEN = re.compile(
    r"\b(?:may|might|could|would|should|must|ought|will|can(?! be| see)|if|unless|whether|perhaps|maybe|possibly|probably|"
    r"likely|presumably|hypothetically|imagin\w+|suppos\w+|pretend\w*|suggest\w*|impl(?:y|ies|ied|ying)|indicat\w+|"
    r"remind\w*|missing|lack\w*|absent|nothing|nobody)\b"
)
"""A sentence with one of these asserts nothing from the comma before it on."""
_AFTER = re.compile(
    r"\b(?:than|unlike|like|instead of|rather than|without|except|similar to|resembl\w+|as (?:\w+ ){1,3}as\b|as an?|"
    r"(?:wait\w*|look\w*|search\w*|hop\w+|ask\w*) for|(?:need|want|wish)(?:s|ed|ing|es)?|bear(?:s|ing)? in mind|"
    r"(?:pictures?|images?|photo\w*|drawings?|paintings?|prints?|posters?|statues?|sculptures?|figur\w+|logos?|shapes?) of|"
    r"toys?|plush|stuffed|fake|model)\b"
)
"""What follows one of these in a sentence is not said to be there."""


def asserted(sentence: str) -> str:
    """The part of a sentence that says what is so, in lower case."""
    said = sentence.lower()
    if any(mark in said for mark in "\"“'‘’"):
        said = _SHORT.sub(" would", _QUOTED.sub(" ", said))
    said = said.replace(" as well as ", " and ").replace(" along with ", " and ")
    found = _OPEN.search(said)
    if found:
        said = said[: max(said.rfind(",", 0, found.start()), 0)]
    found = _AFTER.search(said)
    return said[: found.start()] if found else said
