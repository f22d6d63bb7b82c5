"""Existing datasets join a build: read by their format, asking alike, nothing lost to repeated ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.small_world import small_world
from vlit.data.record import read_records
from vlit.errors import ConfigError, DataError
from vlit.serve.build import synth_build
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.prompts import read_list
from vlit.synth.engine.recipe import items_of
from vlit.synth.engine.settings import read_build, read_settings

ROOT = Path(__file__).resolve().parent.parent


def dataset(folder: Path) -> Path:
    """LLaVA JSON of three records, two of them with the same id, as published sets have them."""
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")

    def record(identity: str, *pairs: tuple[str, str]) -> dict[str, Any]:
        turns = [
            {"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        return {"id": identity, "image": "a.png", "conversations": turns}

    rows = [
        record("1", ("Colour?", "Black.")),
        record("1", ("Size?", "Small."), ("Shape?", "Square.")),
        record("2", ("Q", "A")),
    ]
    path = folder / "old_vqa.json"
    path.write_text(json.dumps(rows))
    return path


def expand(path: Path, out: Path, **recipe: Any) -> list[Any]:
    raw = {
        "recipe": {"type": "expand", "path": str(path), **recipe},
        "out": str(out),
        "images": str(path.parent.parent),
    }
    run(read_settings(None, raw), show=False)
    return list(read_records(out / "dataset.jsonl"))


def test_each_question_asks_for_its_form_of_answer_and_repeated_ids_lose_nothing(tmp_path: Path) -> None:
    path = dataset(tmp_path / "old")
    made = expand(path, tmp_path / "out", asks_for="short", domain="object_recognition", image_prefix="old/")
    words, _ = read_list("format/short")
    assert [record.id for record in made] == ["1", "1#2", "2"]
    assert [turn.text for turn in made[1].turns if turn.role == "assistant"] == ["Small.", "Square."]
    for record in made:
        assert record.images == ("old/a.png",)
        assert (record.kind, record.domain, record.instruction_type) == ("short", "object_recognition", "short")
        assert record.provenance == {"source": "old_vqa", "recipe": "expand"}
        for turn in record.turns:
            if turn.role == "user":
                assert turn.text.rpartition("\n")[2] in words
    assert made[0].turns[0].text.startswith("<image>\nColour?\n")
    plain = expand(path, tmp_path / "plain")
    assert [turn.text for turn in plain[1].turns] == ["<image>\nSize?", "Small.", "Shape?", "Square."]
    assert plain[0].kind is None


def test_a_bad_record_ends_it_with_its_place_and_the_way_out(tmp_path: Path) -> None:
    path = dataset(tmp_path / "old")
    rows = json.loads(path.read_text())
    rows[1]["conversations"][0]["value"] = "<image><image>"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"old_vqa\.json#1 .*--on-bad-record quarantine"):
        expand(path, tmp_path / "out")
    with pytest.raises(ConfigError, match="format"):
        expand(path, tmp_path / "out", format="lava")


def test_a_build_takes_new_and_old_questions_together(tmp_path: Path) -> None:
    world = small_world(tmp_path, train=20)
    old = tmp_path / "old.json"
    rows = json.loads((world.root / "instruct_train.json").read_text())[:5]
    old.write_text(json.dumps(rows))
    words = [
        "world=null", f"out={tmp_path / 'out'}", f"images={world.images}", "quality.eval_images=[]",
        f"annotations=[{world.root / 'annotations' / 'instances_train.json'}]",
        f"recipes.old={{type: expand, path: {old}}}",
    ]  # fmt: skip
    kept = synth_build(read_build(ROOT / "configs" / "synth" / "world.yaml", words), yes=False)
    assert kept is not None
    sources = [record.provenance["recipe"] for record in read_records(tmp_path / "out" / "dataset.jsonl")]
    assert set(sources) == {"llava", "mminstruct", "expand"}
    assert sources.count("expand") == 5


def test_an_id_that_occurs_again_gets_a_number_that_no_other_record_has(tmp_path: Path) -> None:
    records = expand(dataset(tmp_path / "old"), tmp_path / "out")
    ids = [item["id"] for item in items_of([*records, *records])]
    assert len(ids) == len(set(ids)) == 6
