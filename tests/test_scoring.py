"""Scoring rules against hand-computed numbers, published examples and scipy."""

from __future__ import annotations

import pytest
import scipy.stats as stats
from hypothesis import given
from hypothesis import strategies as st

from vlit.errors import EvaluationError
from vlit.eval.scoring import (
    SCORERS,
    Accuracy,
    choice_letter,
    exact_match,
    macro,
    mcq_match,
    micro,
    normalise,
    per_kind_table,
    vqa_accuracy,
    vqa_normalise,
    wilson_interval,
    yes_no,
)


def test_exact_match_ignores_case_outer_space_and_one_trailing_period_only():
    assert normalise("  It is RED. ") == "it is red"
    assert exact_match("it is red", ["It is red."]) == 1.0
    assert exact_match("it  is red", ["It is red."]) == 0.0  # inner space counts
    assert exact_match("red..", ["red"]) == 0.0
    assert exact_match("red!", ["red"]) == 0.0
    assert exact_match("blue", ["red", "Blue."]) == 1.0


@given(st.text())
def test_every_text_matches_itself_exactly(text: str):
    assert exact_match(text, [text]) == 1.0


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("The dog.", "dog"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("top-left", "top left"),  # touches no space: becomes one
        ("top -left", "top left"),  # touches a space: deleted
        ("a - b/c", "b c"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("the man's hat", "man 's hat"),  # the published quirk: 's is detached before contractions are restored
        ("whats", "what's"),
        ("yes?\n", "yes"),
        ("somebody'd", "somebodyd"),  # slip of the published table
    ],
)
def test_vqa_normalisation_follows_the_published_rules_step_by_step(raw: str, wanted: str):
    assert vqa_normalise(raw) == wanted


def test_vqa_accuracy_gives_three_tenths_per_agreeing_human():
    # Leave one out: m equal answers of 10 -> (m * min(1, (m-1)/3) + (10-m) * min(1, m/3)) / 10.
    for equal, wanted in [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]:
        humans = ["Two"] * equal + [f"other {n}" for n in range(10 - equal)]
        assert vqa_accuracy("2.", humans) == pytest.approx(wanted, abs=1e-12)


def test_vqa_accuracy_refuses_too_few_answers_instead_of_capping_the_score():
    with pytest.raises(EvaluationError, match="3 reference answers"):
        vqa_accuracy("red", ["red", "red", "red"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), (" B. ", "B"), ("(B)", "B"), ("B)", "B"), ("B:", "B"),
        ("B. a dog", "B"), ("(B) a dog", "B"), ("The answer is C.", "C"), ("I think the answer is (C)", "C"),
        ("a dog", "B"), ("A Dog.", "B"),  # an option's text; a leading article is not a letter
        ("A dog and a cat", None), ("the answer is A or the answer is B", None), ("", None), ("E", None),
        ("Banana", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_when_named_and_never_guessed(text: str, letter: str | None):
    assert choice_letter(text, ("a cat", "a dog", "a cow", "a pig")) == letter


def test_mcq_compares_letters_and_an_unreadable_answer_is_wrong():
    choices = ("red", "blue")
    assert mcq_match("B. blue", ["B"], choices) == 1.0
    assert mcq_match("blue", ["B"], choices) == 1.0
    assert mcq_match("A", ["B"], choices) == 0.0
    assert mcq_match("hm", ["also unreadable"], choices) == 0.0


def test_yes_and_no_are_read_from_the_first_word_only():
    assert [yes_no(t) for t in ("Yes.", "no, it is not", "** YES", "nothing", "It is not", "")] == [
        "yes", "no", "yes", None, None, None,
    ]  # fmt: skip
    assert SCORERS["yes_no"]("No, the dog is black.", ["no"], ()) == 1.0
    assert SCORERS["yes_no"]("Maybe", ["Maybe"], ()) == 0.0


def test_wilson_interval_equals_values_computed_by_hand():
    # z = 1.959964, z² = 3.841459. 8 of 10: centre (.8 + .192073) / 1.384146 = .716740,
    # half width 1.959964 * sqrt(.016 + .009604) / 1.384146 = .226577.
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490162, abs=2e-6)
    assert high == pytest.approx(0.943318, abs=2e-6)
    # All of n: the low end is n / (n + z²); none of n: the high end is z² / (n + z²).
    assert wilson_interval(20, 20) == (pytest.approx(20 / 23.841459, abs=1e-6), 1.0)
    assert wilson_interval(0, 20) == (0.0, pytest.approx(3.841459 / 23.841459, abs=1e-6))


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_scipys(case: tuple[int, int]):
    wanted = stats.binomtest(*case).proportion_ci(0.95, method="wilson")
    assert wilson_interval(*case) == (pytest.approx(wanted.low, abs=1e-9), pytest.approx(wanted.high, abs=1e-9))


def test_wilson_interval_of_nothing_is_an_error():
    for successes, trials in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(EvaluationError):
            wilson_interval(successes, trials)


def test_micro_counts_questions_and_macro_counts_kinds():
    table = per_kind_table([("a", 1.0), ("b", 0.0), ("a", 1.0), ("a", 1.0), ("b", 1.0)], chance={"a": 0.5})
    assert list(table) == ["a", "b"]
    assert (table["a"].n, table["b"].n) == (3, 2)
    assert (table["a"].accuracy, table["b"].accuracy) == (1.0, 0.5)
    assert (table["a"].chance, table["b"].chance) == (0.5, None)
    assert micro(table) == pytest.approx(4 / 5)
    assert macro(table) == pytest.approx(3 / 4)


def test_soft_scores_are_averaged_not_rounded():
    row = Accuracy.of([0.3, 0.9, 1.0])
    assert row.accuracy == pytest.approx(2.2 / 3)
    assert row.ci_low < row.accuracy < row.ci_high
