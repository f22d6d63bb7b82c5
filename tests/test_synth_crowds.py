"""A crowd is there, and nobody knows how many: no count, no absence and no only one of its name is ever said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from vlit.data.record import Record, read_records
from vlit.serve.quality import measure_quality
from vlit.synth.engine.embedded import DOMAINS, converse, describe, domain_pair, reason
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.settings import read_settings
from vlit.synth.engine.views import Thing, View, read_views
from vlit.synth.quality.annotations import read_annotations
from vlit.synth.quality.correctness import agreement_of
from vlit.types import Turn

NAMES = ("person", "dog", "car", "bench", "kite", "boat")


def write_coco(folder: Path, pictures: int = 12) -> str:
    """A dog, a crowd of persons and one other thing in every picture, a person of its own in every second."""
    (folder / "images").mkdir()
    rows: list[dict[str, Any]] = []

    def add(picture: int, name: str, box: list[int], *, crowd: int = 0) -> None:
        about = {"id": len(rows), "image_id": picture, "category_id": NAMES.index(name)}
        rows.append(about | {"bbox": box, "area": box[2] * box[3], "iscrowd": crowd})

    for number in range(pictures):
        Image.new("RGB", (100, 80), (20 * number, 90, 40)).save(folder / "images" / f"{number}.png")
        add(number, "dog", [5, 5, 20, 20])
        add(number, "person", [30, 10, 60, 60], crowd=1)
        if number % 2:
            add(number, "person", [2, 40, 20, 30])
        add(number, NAMES[2 + number % 4], [60, 60, 20, 15])
    images = [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 80} for n in range(pictures)]
    groups = {"person": "person", "dog": "animal"}
    categories = [{"id": n, "name": name, "supercategory": groups.get(name, "object")} for n, name in enumerate(NAMES)]
    path = folder / "instances_x.json"
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return str(path)


@pytest.mark.parametrize("recipe", [{"type": "adapt"}, {"type": "llava"}, {"type": "mminstruct"}])
def test_no_record_counts_denies_or_singles_out_a_crowd_and_quality_agrees(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    coco = write_coco(tmp_path)
    raw = {"recipe": recipe, "teacher": {"type": "annotations"}, "annotations": [coco], "images": str(tmp_path / "images"),
           "out": str(tmp_path / "out")}  # fmt: skip
    run(read_settings(None, raw), show=False)
    records = list(read_records(tmp_path / "out" / "dataset.jsonl"))
    assert len(records) >= 10
    about_persons = 0
    for record in records:
        for asked, answered in zip(record.turns[::2], record.turns[1::2], strict=True):
            if "person" in asked.text:
                about_persons += 1
                assert not re.search(r"\b(how many|number of|count)\b", asked.text, re.IGNORECASE), record
                assert record.kind not in ("count", "detection", "refer", "relation"), record
                if record.kind == "existence":
                    assert answered.text == "Yes", record
            assert not re.search(r"\b(one|two|three|four|1|2|3|4) (objects?|persons?)\b", answered.text), record
    assert about_persons or recipe["type"] != "adapt"
    measure_quality(tmp_path / "out" / "dataset.jsonl", images=tmp_path / "images", annotations=[coco], workers=1)
    card = json.loads((tmp_path / "out" / "dataset.quality" / "card.json").read_text())
    assert card["correctness"]["annotated_records"] == len(records)
    known = read_annotations([coco])
    assert known is not None
    assert not any(+agreement_of(record, known).wrong for record in records)


def test_the_name_of_a_crowd_is_kept_in_a_view_and_its_item(tmp_path: Path) -> None:
    view = read_views([Path(write_coco(tmp_path))], tmp_path / "images")[0]
    assert (view.crowds, [thing.name for thing in view.things]) == (("person",), ["dog", "car"])
    assert View.of(json.loads(json.dumps(view.to_item()))) == view
    assert "crowds" not in View("a", "a.png", (), view.things).to_item()


def test_the_embedded_teacher_speaks_of_a_crowd_as_a_group() -> None:
    one, dog = Thing("person", (0.0, 0.5, 0.2, 0.9)), Thing("dog", (0.6, 0.1, 0.8, 0.3))
    view = View("a", "a.png", (), (one, dog), crowds=("person",))
    assert describe(view).startswith("There is a group of persons in the image.")
    said = [pair for seed in range(40) for pair in converse(view, Random(seed))]
    said += [pair for seed in range(40) if (pair := reason(view, Random(seed))) is not None]
    for domain in DOMAINS:
        drawn = [domain_pair(view, domain, kind, Random(n)) for n in range(40) for kind in ("short", "judgement")]
        said += [pair for pair in drawn if pair is not None]
    assert len(said) > 100
    for pair in said:
        assert "the person" not in pair.question, pair
        assert "number of persons" not in pair.question, pair
        assert not (pair.answer == "No" and "person" in pair.question), pair


@pytest.mark.parametrize(
    ("question", "answer", "claims", "wrong"),
    [
        ("How many persons are in the image?", "1", {}, {}),
        ("How many persons are in the image?", "There are 20 persons.", {}, {}),
        ("Is there a person?", "No.", {"yes_no": 1}, {"yes_no": 1}),
        ("Is there a person?", "Yes.", {"yes_no": 1}, {}),
        ("Describe it.", "There is no person.", {"exists": 1}, {"exists": 1}),
        ("Describe it.", "A person stands beside the dog.", {"exists": 2}, {}),
        ("Describe it.", "A person stands at the top-left.", {}, {}),
        ("How many dogs are there?", "Two.", {"count": 1}, {"count": 1}),
        ("Where is the person?", "[0.50, 0.50, 0.60, 0.70]", {}, {}),
    ],
)
def test_what_a_crowd_leaves_open_is_not_compared(
    question: str, answer: str, claims: dict[str, int], wrong: dict[str, int], tmp_path: Path
) -> None:
    known = read_annotations([write_coco(tmp_path, pictures=1)])
    assert known is not None
    found = agreement_of(Record("r", (Turn("user", question), Turn("assistant", answer)), ("0.png",)), known)
    assert (dict(+found.claims), dict(+found.wrong)) == (claims, wrong)
