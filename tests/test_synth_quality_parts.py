"""Sketches, pictures, the blind guesser and published formulas of the quality card."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_synth_quality import street
from vlit.synth.quality.blind import blind_share, guessed_by_majority
from vlit.synth.quality.pictures import join, look_at, same_across, same_within
from vlit.synth.quality.published import (
    bleu,
    dataset_quality,
    keep_upper_half,
    meta_quality,
    meteor,
    rouge_l,
    sample_quality,
    sensitivity,
)  # fmt: skip
from vlit.synth.quality.sketches import Distinct, band_keys, earlier_of, jaccard, near_duplicates

CHECKS = {
    "wrong_count": ("wrong_count",), "wrong_colour": ("wrong_colour",), "duplicate": ("exact", "paraphrase"),
    "leaks": ("leak",), "eval_image": ("eval_image",), "eval_text": ("eval_text",),
}  # fmt: skip
# --- sketches, pictures, blind ------------------------------------------------------------------------------------------


def test_distinct_counts_are_within_three_percent() -> None:
    for number in (10, 1000, 300_000):
        counter = Distinct()
        values = np.random.default_rng(0).integers(0, 1 << 63, number, dtype=np.uint64)
        for part in np.array_split(np.concatenate([values, values]), 7):
            counter.add(part)
        assert counter.count() == pytest.approx(number, rel=0.03)


@pytest.mark.parametrize("number", [0, 1, 500, 20_000, 30_000, 41_000, 45_000, 60_000, 400_000])
def test_the_count_of_distinct_values_has_no_bias_and_its_stated_error(number: int) -> None:
    errors = []
    for seed in range(12):
        counter = Distinct()
        values = np.random.default_rng([number, seed]).integers(0, 1 << 63, number, dtype=np.uint64)
        counter.add(values)
        errors.append(counter.count() / max(len(np.unique(values)), 1) - (number > 0))
    assert abs(np.mean(errors)) <= 3 * 0.0081 / np.sqrt(12)
    assert np.sqrt(np.mean(np.square(errors))) <= 1.6 * 0.0081


def test_similar_sets_become_pairs_with_their_exact_jaccard() -> None:
    rng = np.random.default_rng(1)
    base = [rng.choice(1 << 40, 30, replace=False).astype(np.uint64) for _ in range(400)]
    near = [np.concatenate([one[:27], rng.choice(1 << 40, 3).astype(np.uint64)]) for one in base]
    sets = base + near
    starts = np.r_[0, np.cumsum([len(one) for one in sets])]
    values = np.concatenate(sets)
    pairs = np.stack([rng.integers(0, 800, 500), rng.integers(0, 800, 500)], axis=1)
    pairs[:400] = [(n, n + 400) for n in range(400)]
    exact = [len(set(sets[a]) & set(sets[b])) / len(set(sets[a]) | set(sets[b])) for a, b in pairs.tolist()]
    np.testing.assert_allclose(jaccard(values, starts, pairs), exact)
    earlier = np.full(800, -1)
    similar = near_duplicates(band_keys(values, starts), values, starts, near=0.7, earlier=earlier)
    assert earlier.tolist() == [-1] * 400 + list(range(400))
    np.testing.assert_allclose(similar[400:], exact[:400], rtol=1e-6)


def test_a_text_repeated_often_costs_one_comparison_each() -> None:
    values = np.tile(np.arange(20, dtype=np.uint64), 50_000)
    values[19::20] = np.arange(1000, 51_000, dtype=np.uint64)
    starts = np.arange(0, 20 * 50_001, 20)
    earlier = np.full(50_000, -1)
    clock = time.process_time()
    near_duplicates(band_keys(values, starts), values, starts, near=0.7, earlier=earlier)
    assert (earlier[1:] == 0).mean() > 0.999
    assert time.process_time() - clock < 10


def test_a_duplicate_of_a_removed_record_is_kept_unless_it_repeats_one_that_stays() -> None:
    assert earlier_of(4, np.array([[0, 1], [1, 2], [2, 3]])).tolist() == [-1, 0, -1, 2]


def test_the_majority_is_counted_without_the_turn_itself() -> None:
    templates = np.array([1, 1, 1, 1, 2, 3, 3], np.uint64)
    answers = np.array([7, 7, 7, 8, 7, 5, 6], np.uint64)
    assert guessed_by_majority(templates, answers).tolist() == [True, True, True, False, False, False, False]


def test_any_function_of_questions_can_be_the_blind_guesser() -> None:
    record, _ = street("<image>\nIs there a cat?", "No.", "What color is the car?", "Red.")
    asked: list[str] = []
    assert blind_share(record, lambda questions: asked.extend(questions) or ["no"] * len(questions)) == 0.5
    assert asked == ["Is there a cat?", "What color is the car?"]


def test_pictures_that_look_the_same_are_found_and_damaged_ones_look_like_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    Image.open(tmp_path / "3.png").resize((80, 60)).save(tmp_path / "8.jpg", quality=70)
    (tmp_path / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    names = [*(f"{n}.png" for n in range(8)), "8.jpg", "9.png"]
    looks = look_at((names, tmp_path))
    assert looks.known.tolist() == [True] * 9 + [False]
    assert same_within(looks).tolist() == [[3, 8]]
    assert same_across(looks, join([look_at((["8.jpg"], tmp_path))])).tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, 0, -1]


# --- published formulas -------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_mean_coefficient_of_variation_over_instructions() -> None:
    scores = {"a": [0.5, 0.5, 0.5], "b": [0.2, 0.4, 0.6]}
    assert sensitivity(scores) == pytest.approx((0 + np.std([0.2, 0.4, 0.6]) / 0.4) / 2)


def test_revo_lion_means_go_over_the_right_axis() -> None:
    assert meta_quality(0.2, 0.3, 0.4) == pytest.approx(0.3)
    tuned_on_evaluated = np.array([[0.4, 0.2], [0.6, 0.8]])
    assert dataset_quality(tuned_on_evaluated) == pytest.approx([0.3, 0.7])
    assert sample_quality(tuned_on_evaluated) == pytest.approx([0.5, 0.5])
    assert keep_upper_half(np.array([0.1, 0.4, 0.3, 0.9])).tolist() == [False, True, False, True]


def test_text_scores_are_one_for_the_same_text_and_zero_without_a_common_word() -> None:
    text = "a dog runs across the wide green field"
    for score in (bleu, rouge_l):
        assert score(text, text) == pytest.approx(1)
    assert meteor(text, text) == pytest.approx(1 - 0.5 / 8**3)
    for score in (bleu, rouge_l, meteor):
        assert score("one two", "three four") == 0
    assert rouge_l("the cat sat", "the cat on the mat sat") == pytest.approx((1 + 1.44) * 1 * 0.5 / (0.5 + 1.44))
