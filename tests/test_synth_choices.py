"""Which option the answer of a multiple choice names (recipe mminstruct)."""

from __future__ import annotations

import pytest

from vlit.synth.engine.parse import Pair, Rejected
from vlit.synth.recipes.mminstruct import check_pair


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"), ("c", "C"), ("(C)", "C"), ("C.", "C"), ("C)", "C"), (" C: ", "C"), ("C. A dog", "C"), ("c) a  dog.", "C"),
        ("(C) A dog", "C"), ("A dog", "C"), ("a dog.", "C"), ("Cat", "A"), ("bird", "B"), ("B. b", None), ("B: A dog", None),
        ("A or B", None), ("A & B", None), ("A, B and C", None), ("A. cat B. bird", None), ("A red car.", None), ("E", None),
        ("I think C", None), ("C is right", None), ("dog", None), ("D) cat", None), ("-", None), ("A-B", None),
        ("D fish", None),
    ],
)  # fmt: skip
def test_a_choice_is_the_letter_of_the_option_that_the_answer_names(answer: str, letter: str | None) -> None:
    pair = Pair("What animal is there?", answer, ("cat", "bird", "A dog", "fish"))
    if letter is not None:
        assert check_pair(pair, "choice").answer == letter
        return
    with pytest.raises(Rejected, match="options"):
        check_pair(pair, "choice")


def test_a_choice_between_letters_or_equal_texts_is_not_guessed() -> None:
    letters = ("B", "A", "C", "D")
    assert check_pair(Pair("Which letter?", "C", letters), "choice").answer == "C"
    assert check_pair(Pair("Which letter?", "A. B", letters), "choice").answer == "A"
    for answer, options in (("A", letters), ("dog", ("dog", "Dog", "cat", "ox"))):
        with pytest.raises(Rejected, match="options"):
            check_pair(Pair("Which?", answer, options), "choice")
