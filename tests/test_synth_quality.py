"""Quality metrics against faults that were planted, formulas by hand, filters and selection, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.planted import Planted, plant
from vlit.data.record import Record, Region, read_records, write_records
from vlit.errors import ConfigError, DataError
from vlit.serve.quality import measure_quality
from vlit.synth.digits.world import ensure_world
from vlit.synth.quality.annotations import Annotations, Thing, read_annotations
from vlit.synth.quality.blind import blind_share, guessed_by_majority
from vlit.synth.quality.correctness import agreement_of, leaks
from vlit.synth.quality.filters import parse_filters
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
from vlit.synth.quality.scan import Measured, measure
from vlit.synth.quality.select import select
from vlit.synth.quality.sketches import Distinct, band_keys, earlier_of, jaccard, near_duplicates
from vlit.synth.quality.words import root_of
from vlit.types import Turn

CHECKS = {
    "wrong_count": ("wrong_count",), "wrong_colour": ("wrong_colour",), "duplicate": ("exact", "paraphrase"),
    "leaks": ("leak",), "eval_image": ("eval_image",), "eval_text": ("eval_text",),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    root = tmp_path_factory.mktemp("quality")
    world = ensure_world(
        root / "world", train_images=400, validation_images=10, test_images=60, questions_per_kind=2, progress=False
    )
    return plant(world, root / "data")


@pytest.fixture(scope="module")
def found(planted: Planted) -> Measured:
    known = read_annotations([planted.annotations])
    return measure(
        planted.path, images=planted.images, annotations=known, eval_texts=[planted.eval_texts],
        eval_images=[planted.eval_images],
    )  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_planted_faults_are_found_and_nothing_else(check: str, planted: Planted, found: Measured) -> None:
    wanted = set().union(*(planted.faults[fault] for fault in CHECKS[check]))
    ids = np.array(found.fields["id"])
    flagged = set(ids[found.numbers[check] > 0].tolist())
    precision, recall = len(flagged & wanted) / max(len(flagged), 1), len(flagged & wanted) / len(wanted)
    print(f"{check}: precision {precision:.3f}, recall {recall:.3f}, {len(wanted)} planted among {len(ids)}")
    assert len(wanted) >= 40
    assert precision >= 0.95
    assert recall >= 0.95
    for fault in CHECKS[check]:
        assert len(flagged & planted.faults[fault]) / len(planted.faults[fault]) >= 0.95


def test_two_processes_measure_what_one_does(planted: Planted, found: Measured) -> None:
    again = measure(planted.path, annotations=read_annotations([planted.annotations]), workers=2)
    assert again.fields["id"] == found.fields["id"]
    for name in ("correctness", "complexity", "leaks", "blind"):
        np.testing.assert_array_equal(again.numbers[name], found.numbers[name], err_msg=name)
    assert again.distinct == found.distinct


def test_the_command_writes_card_page_kept_and_removed(planted: Planted, tmp_path: Path) -> None:
    from vlit.cli import main

    words = [
        "synth",
        "quality",
        str(planted.path),
        "--images",
        str(planted.images),
        "--annotations",
        planted.annotations,
    ]
    words += ["--eval-images", str(planted.eval_images), "--eval-texts", str(planted.eval_texts), "--workers", "1"]
    assert main([*words, "--keep", "clean", "--keep", "complexity>=0.05", "--out", str(tmp_path)]) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    kept = list(read_records(tmp_path / "kept.jsonl"))
    assert len(kept) + len(removed) == card["records"] > 1000
    assert len(kept) == card["kept"]["records"]
    faults = set().union(*planted.faults.values())
    assert len({record.id for record in kept} & faults) <= 0.05 * len(faults)
    assert all(entry["reasons"] for entry in removed)
    assert any("wrong" in reason or "correctness is" in reason for entry in removed for reason in entry["reasons"])
    page = (tmp_path / "card.html").read_text()
    assert page.count("data:image/") > 10
    assert page.count("<svg") > 5
    assert "http://" not in page
    assert "https://" not in page
    assert card["provenance"]["licences"] == {"CC BY 4.0": card["records"]}
    assert card["provenance"]["cost_usd"] == pytest.approx(0.001 * card["records"], rel=1e-3)


# --- agreement with annotations ---------------------------------------------------------------------------------------

STREET = (
    Thing("dog", "animal", "brown", (0.1, 0.6, 0.3, 0.9)),
    Thing("dog", "animal", "black", (0.6, 0.6, 0.8, 0.9)),
    Thing("traffic light", "outdoor", "", (0.7, 0.0, 0.8, 0.3)),
    Thing("car", "vehicle", "red", (0.2, 0.1, 0.45, 0.3)),
)


def street(*turns: str) -> tuple[Record, Annotations]:
    known = Annotations({"a.jpg": STREET})
    for kind, names in (
        ("label", ("dog", "traffic light", "car", "cat", "bus", "person")),
        ("group", ("animal", "vehicle")),
    ):
        for name in names:
            known.add_name(kind, name)
    roles = ("user", "assistant")
    said = tuple(Turn(roles[n % 2], text) for n, text in enumerate(turns))
    return Record("r", said, ("a.jpg",)), known


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        ("<image>\nDescribe it.", "Two dogs stand near a red car, below a traffic light.", {}),
        ("<image>\nDescribe it.", "There are three dogs in the picture.", {"count": 1}),
        ("<image>\nHow many dogs are there?", "2", {}),
        ("<image>\nHow many dogs are there?", "Three.", {"count": 1}),
        ("<image>\nHow many animals do you see?", "There are two animals.", {}),
        ("<image>\nDescribe it.", "A green car is parked behind a brown dog.", {"colour": 1}),
        ("<image>\nDescribe it.", "The car is blue.", {"colour": 1}),
        ("<image>\nDescribe it.", "A bus passes the dogs.", {"exists": 1}),
        ("<image>\nDescribe it.", "There is no bus, only a car.", {}),
        ("<image>\nDescribe it.", "There is no car.", {"exists": 1}),
        ("<image>\nIs there a cat?", "No.", {}),
        ("<image>\nIs there a cat?", "Yes, there is.", {"yes_no": 1}),
        ("<image>\nIs the car red?", "No.", {"yes_no": 1}),
        ("<image>\nIs the dog asleep?", "No.", {}),
        ("<image>\nWhat color is the car?", "red", {}),
        ("<image>\nWhat color is the car?", "yellow", {"colour": 1}),
        ("<image>\nWhere is the car?", "[0.20, 0.10, 0.45, 0.30]", {}),
        ("<image>\nWhere is the car?", "[0.60, 0.60, 0.80, 0.90]", {"box": 1}),
        ("<image>\nWhere is the traffic light?", "The traffic light is at [0.1, 0.1, 0.2, 0.2].", {"box": 1}),
        ("<image>\nWhat might happen next?", "The driver may stop, because it is getting late.", {}),
    ],
)
def test_claims_are_compared_with_what_the_picture_shows(question: str, answer: str, wrong: dict[str, int]) -> None:
    assert {check: n for check, n in agreement_of(*street(question, answer)).wrong.items() if n} == wrong


def test_sentences_without_a_claim_are_not_measured() -> None:
    assert math.isnan(agreement_of(*street("<image>\nWhy?", "Nobody can tell.")).share)


def test_regions_stand_in_for_annotations_where_they_are_complete(tmp_path: Path) -> None:
    regions = (Region("red car", (0.2, 0.1, 0.45, 0.3)), Region("dog", (0.1, 0.6, 0.3, 0.9)))
    turns = (Turn("user", "<image>\nWhat is there?"), Turn("assistant", "There is a blue car and a dog."))
    write_records(tmp_path / "d.jsonl", [Record("r", turns, ("a.jpg",), regions=regions)])
    found = measure(tmp_path / "d.jsonl", annotations=read_annotations(["regions"]))
    assert found.numbers["wrong_colour"].tolist() == [1]
    assert found.numbers["claims"].tolist() == [2]


@pytest.mark.parametrize(
    ("question", "answer", "leaking"),
    [
        ("The sign says stop. What does the sign say?", "Stop.", True),
        ("What color is the red car?", "The car is red.", True),
        ("What color is the car?", "The car is red.", False),
        ("Is the car red?", "Yes, the car is red.", False),
        ("Is it day or night?", "Night.", False),
        ("Which?\nA. dog\nB. cat", "A", False),
        ("Which animal is it?\nA. dog\nB. cat\n", "dog", False),
    ],
)
def test_leaks_are_answers_that_stand_in_their_question(question: str, answer: str, leaking: bool) -> None:
    assert leaks(question, answer) is leaking


@pytest.mark.parametrize(
    ("question", "root"),
    [
        ("<image>\nDescribe the picture in detail.", ("describe", "picture")),
        ("How many dogs do you see?", ("see", "dog")),
        ("What color is the digit?", ("be", "color")),
        ("What is the man holding?", ("hold", "man")),
    ],
)
def test_roots_are_verb_and_noun(question: str, root: tuple[str, str]) -> None:
    assert root_of(question) == root


# --- sketches, pictures, blind ------------------------------------------------------------------------------------------


def test_distinct_counts_are_within_three_percent() -> None:
    for number in (10, 1000, 300_000):
        counter = Distinct()
        values = np.random.default_rng(0).integers(0, 1 << 63, number, dtype=np.uint64)
        for part in np.array_split(np.concatenate([values, values]), 7):
            counter.add(part)
        assert counter.count() == pytest.approx(number, rel=0.03)


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


# --- filters, selection, faults of use ----------------------------------------------------------------------------------


def test_filters_name_what_is_wrong_with_them() -> None:
    assert [str(rule) for rule in parse_filters(["correctness >= 0.5", "no_leaks"])] == ["correctness>=0.5", "leaks==0"]
    with pytest.raises(ConfigError, match='Did you mean "correctness"'):
        parse_filters(["corectness>=0.5"])
    with pytest.raises(ConfigError, match="neither"):
        parse_filters(["correctness is good"])
    with pytest.raises(ConfigError, match="--annotations"):
        parse_filters(["correct"], missing={"correctness"})


def test_selection_prefers_quality_and_then_what_it_has_least_of() -> None:
    quality = np.array([0.9, 0.9, 0.9, 0.5, 0.1])
    groups = [["a", "a", "a", "b", "c"]]
    assert select(quality, groups, 2, weight=1.0).tolist() == [0, 3]
    assert select(quality, groups, 2, weight=0.0).tolist() == [0, 1]
    rng = np.random.default_rng(0)
    quality, names = rng.random(300), [str(n) for n in rng.integers(0, 20, 300)]
    chosen = select(quality, [names], 60)
    assert len(set(chosen.tolist())) == 60
    assert all(a < b for a, b in pairwise(chosen.tolist()))
    assert chosen.tolist() == _greedy(quality, names, 60)


def _greedy(quality: np.ndarray, names: list[str], count: int) -> list[int]:
    taken: dict[str, int] = {}
    left = set(range(len(quality)))
    for _ in range(count):
        best = max(left, key=lambda row: (quality[row] + 1 / (1 + taken.get(names[row], 0)), -row))
        left.remove(best)
        taken[names[best]] = taken.get(names[best], 0) + 1
    return sorted(set(range(len(quality))) - left)


def test_a_selection_has_the_asked_size_no_fault_and_many_pictures(planted: Planted, tmp_path: Path) -> None:
    card = measure_quality(planted.path, annotations=[planted.annotations], out=tmp_path, select=200, workers=1)
    kept = list(read_records(tmp_path / "kept.jsonl"))
    assert len(kept) == card["kept"]["records"] == 200
    measured = set().union(
        *(planted.faults[fault] for fault in ("wrong_count", "wrong_colour", "exact", "paraphrase", "leak"))
    )
    assert not {record.id for record in kept} & measured
    assert len({record.images for record in kept}) > 150
    assert card["kept"]["reasons"] == {"not selected": card["records"] - 200}


def test_unreadable_records_are_counted_and_never_kept(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = {"id": "a", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello there."}]}
    path.write_text("\n".join([json.dumps(good), '{"id": "b"}', "{broken", json.dumps(good | {"id": "c"})]) + "\n")
    card = measure_quality(path, keep=["unique"], workers=1)
    assert card["bad_records"] == 2
    assert card["kept"] == {
        "records": 1,
        "removed": 3,
        "reasons": {"unreadable": 2, "duplicate==0": 1},
        "filters": ["duplicate==0"],
    }
    assert [record.id for record in read_records(tmp_path / "d.quality" / "kept.jsonl")] == ["a"]


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        measure(tmp_path / "d.jsonl")
    (tmp_path / "coco.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="not a COCO"):
        read_annotations([str(tmp_path / "coco.json")])


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    words = ["".join(chr(97 + (n * k) % 26) for k in (3, 5, 7, 11, 13)) for n in range(1, 999)]
    for number in (1, 6):
        with (tmp_path / f"{number}.jsonl").open("w") as file:
            for row in range(600 * number):
                said = " ".join(words[(row * 7 + n * n) % len(words)] for n in range(20)) + " and so on" * 150
                turns = [{"from": "human", "value": said}, {"from": "gpt", "value": f"Answer {row}."}]
                file.write(json.dumps({"id": str(row), "conversations": turns}) + "\n")
    code = (
        "import sys, resource; from pathlib import Path; from vlit.synth.quality.scan import measure; "
        "measure(Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    small, large = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / f"{n}.jsonl")], capture_output=True, text=True, check=True
            ).stdout
        )
        for n in (1, 6)
    )
    assert (tmp_path / "6.jsonl").stat().st_size - (tmp_path / "1.jsonl").stat().st_size > 4e6
    assert large - small < 8_000  # kB
