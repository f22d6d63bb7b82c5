"""The sets of the data ablation hold the fault they are named after, and no other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from benchmarks.data_ablation import VARIANTS, Variant, first_wording, sign_test, table, with_wrong_answers
from tests.digits_truth import check_record, facts
from tests.small_world import small_world
from vlit.data.record import Record, check, read_records
from vlit.serve.build import synth_build
from vlit.synth.engine.settings import read_build

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("ablation")
    world = small_world(folder, train=150, test=4)
    words = [
        "world=null", f"out={folder / 'out'}", f"images={world.images}", "quality.eval_images=[]",
        f"annotations=[{world.root / 'annotations' / 'instances_train.json'}]",
    ]  # fmt: skip
    kept = synth_build(read_build(ROOT / "configs" / "synth" / "world.yaml", words), yes=False)
    assert kept is not None
    return world.root, list(read_records(kept))


def single(records: list[Record]) -> list[Record]:
    """One record a turn, so that each answer is judged for itself."""
    return [
        Record(f"{r.id}/{n}", r.turns[n : n + 2], r.images, kind=r.kind)
        for r in records
        for n in range(0, len(r.turns), 2)
    ]


def test_a_planted_answer_is_wrong_and_the_others_are_untouched(built: tuple[Path, list[Record]]) -> None:
    root, records = built
    kinds = ("conversation", "detail", "judgement", "choice", "long")  # whose every answer the checker can judge
    before = [r for r in single(records) if r.kind in kinds]
    after = with_wrong_answers(before, Random(1), share=0.3)
    changed = [new for old, new in zip(before, after, strict=True) if new != old]
    assert abs(len(changed) / len(before) - 0.3) < 3 * (0.21 / len(before)) ** 0.5
    truth = facts(root)

    def wrong(record: Record) -> bool:
        try:
            check_record(record, truth[record.images[0]])
        except (AssertionError, KeyError):
            return True
        return False

    assert not any(wrong(record) for record in before)
    still_true = sum(not wrong(record) for record in changed)
    assert still_true <= 0.02 * len(changed), "another thing of the picture may happen to be as the wrong answer says"


def test_one_wording_of_a_question_is_left(built: tuple[Path, list[Record]]) -> None:
    _, records = built
    before, after = (
        {" ".join(t.text.replace("<image>", "").split()[:2]) for r in rows for t in r.turns if t.role == "user"}
        for rows in (records, first_wording(records, Random(0)))
    )
    gone = {"Name the", "Count the", "Add up", "What digit", "Where do", "Find the"}
    assert gone <= before
    assert not gone & after


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_set_has_as_many_valid_records_with_ids_of_their_own(
    variant: Variant, built: tuple[Path, list[Record]]
) -> None:
    _, records = built
    made = variant.make(records, Random(0))
    assert len(made) == len(records)
    assert len({record.id for record in made}) == len(made)
    for record in made:
        check(record)
    different = len({(record.images, record.turns) for record in made})
    expected = {"duplicates-10": 0.1, "duplicates-100": 0.01}.get(variant.name)
    if expected is not None:
        assert different == round(expected * len(records))
    if variant.name == "one-template":
        questions = Counter(t.text for r in made for t in r.turns if t.role == "user")
        assert list(questions) == ["<image>\nDescribe the picture in detail."]


def test_the_sign_test_is_that_of_the_binomial_distribution() -> None:
    from scipy.stats import binomtest

    rng = Random(0)
    ours, theirs = ([{str(n): rng.random() < share for n in range(80)} for _ in range(2)] for share in (0.6, 0.5))
    pairs = [(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in a]
    wins, losses = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    assert sign_test(ours, theirs) == pytest.approx(binomtest(wins, wins + losses).pvalue)
    assert sign_test(ours, ours) == 1.0


def test_the_table_shows_every_seed() -> None:
    row = {
        "what": "x",
        "correctness": 0.5,
        "duplicates": 0.25,
        "templates": 3.0,
        "quality": 0.1,
        "accuracy": [0.5, 0.75],
    }
    assert "| a | x | 0.500 | 25 % | 3.0 | 0.100 | 50.0 · 75.0 | 62.5 | - |" in table({"a": row})
