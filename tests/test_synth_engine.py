"""The parts of the data engine one by one: journal, log of calls, parsing, prompts, views, balancing, similarity, settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlit.errors import ConfigError, DataError, SynthError
from vlit.synth.engine.balance import balance, noun_phrases
from vlit.synth.engine.calls import BudgetExhausted, CallLog, read_totals
from vlit.synth.engine.journal import Journal, read_rows
from vlit.synth.engine.parse import Pair, Rejected, check_answer, read_options, read_pairs
from vlit.synth.engine.prompts import FOLDER, find, read_groups, read_list, read_prompt
from vlit.synth.engine.settings import read_settings
from vlit.synth.engine.similarity import average_hash, neighbours, tfidf
from vlit.synth.engine.stages import JournalItems, Outcome, Select, SelectedItems, StageStore
from vlit.synth.engine.teacher import Ask, Message, Reply, Teacher
from vlit.synth.engine.views import Thing, View, read_views, views_of_folder
from vlit.synth.teachers.openai import OpenAIConfig


def filled(path: Path, count: int) -> list[dict[str, Any]]:
    rows = [{"n": n, "text": "é" * n} for n in range(count)]
    journal = Journal(path)
    assert list(journal.recover()) == []
    for row in rows:
        journal.append(row)
    journal.close()
    return rows


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), tail=st.sampled_from([b"", b"{", b"\0\0\0", b'{"n": 1', b"\xff"]))
def test_a_journal_cut_at_any_byte_keeps_its_complete_lines_and_goes_on(
    cut: int, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    rows = filled(path, 12)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + tail)
    complete = whole[:cut].count(b"\n")
    journal = Journal(path)
    assert [row for _, row in journal.recover()] == rows[:complete]
    offset = journal.append({"n": "new"})
    assert journal.read(offset) == {"n": "new"}
    journal.close()
    assert [row for _, row in read_rows(path)] == [*rows[:complete], {"n": "new"}]


def test_a_damaged_line_before_others_is_an_error_and_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    filled(path, 3)
    journal = Journal(path)
    with pytest.raises(SynthError, match="another process"):
        Journal(path)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"n": \n' + lines[2])
    with pytest.raises(DataError, match="line 2 is damaged"):
        list(Journal(path).recover())


def test_what_is_reserved_settled_and_orphaned_is_the_same_after_a_restart(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls.jsonl", cap_nano=1000)
    for key, amount in (("a", 300), ("b", 200), ("c", 400)):
        log.reserve(amount)
        number = log.sent(key, amount)
        if key != "c":  # c leaves and nothing is heard of it
            log.got(number, key, f"body of {key}")
        if key == "a":
            log.settle(number, 50, ok=True, tokens=(10, 20))
    assert log.totals.committed == 50 + 200 + 400
    log.close()
    again = CallLog(tmp_path / "calls.jsonl", cap_nano=1000)
    assert (again.totals.committed, again.orphans) == (650, 1)
    assert again.find("a") == (1, "body of a")
    assert again.find("c") is None
    number, _ = again.find("b") or (0, "")
    assert not again.is_settled(number)
    with pytest.raises(BudgetExhausted, match=r"Raise budget_usd"):
        again.reserve(400)
    again.settle(number, 20, ok=False)
    again.reserve(400)  # fits now: 50 + 20 + 400 + 400 <= 1000
    assert again.find("b") is None
    assert read_totals(tmp_path / "calls.jsonl").tokens_out == 20
    again.close()


def test_pairs_are_read_from_blocks_tags_and_json() -> None:
    expected = [Pair("What?", "A dog."), Pair("Where?", "Left.\nAnd right.")]
    blocks = "Question:\nWhat?\n===\nAnswer:\nA dog.\n===\nQuestion: Where?\n===\nAnswer: Left.\nAnd right.\n"
    tags = "<Q1>What?</Q1>\n<A1>A dog.</A1> <Q2> Where?</Q2><A2>Left.\nAnd right.</A2>"
    data = json.dumps({"pairs": [{"question": p.question, "answer": p.answer} for p in expected]})
    for text in (blocks, tags, data, f"```json\n{data}\n```"):
        assert read_pairs(Reply(text)) == expected, text
    choice = read_pairs(Reply("<Q1>Which?</Q1><C1>A. red B. light blue\nC) green (D) none</C1><A1>B</A1>"))
    assert choice == [Pair("Which?", "B", ("red", "light blue", "green", "none"))]


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply("", refused="no"), "refused"),
        (Reply("Question: a\n===\nAnswer: b", cut=True), "cut"),
        (Reply("  "), "empty"),
        (Reply("A poem."), "format"),
        (Reply("Question: a\n===\nQuestion: b\n===\nAnswer: c"), "format"),
        (Reply("Question: a\n===\nAnswer:"), "format"),
        (Reply("<Q1>a</Q1><A1>b"), "format"),
        (Reply('{"pairs": [{"question": "a"'), "format"),
        (Reply('{"pairs": []}'), "format"),
        (Reply("<Q1>a</Q1><C1>A. x C. y</C1><A1>A</A1>"), "options"),
    ],
)
def test_a_reply_that_is_no_answer_is_rejected_with_its_reason(reply: Reply, code: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_pairs(reply)
    assert caught.value.code == code


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='QA<>/12:=\n {}[]"xABC.', max_size=80))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    try:
        pairs = read_pairs(Reply(text))
    except Rejected:
        return
    assert pairs
    assert all(pair.question and pair.answer for pair in pairs)


def test_answers_about_their_source_unsure_ones_and_coordinates_are_rejected() -> None:
    for text, code in (
        ("The caption says it is red.", "source"),
        ("As an AI, I see a dog.", "source"),
        ("The color is not mentioned.", "unsure"),
        ("The dog is at [0.12, 0.30, 0.40, 0.65].", "coordinates"),
        ("See <image>.", "image_mark"),
        ("x" * 9000, "long"),
    ):
        with pytest.raises(Rejected) as caught:
            check_answer(text)
        assert caught.value.code == code
    assert check_answer("A dog runs at 3 pm.") == "A dog runs at 3 pm."
    assert read_options("A. one B. two") == ("one", "two")


def test_every_prompt_that_comes_with_vlit_reads_and_its_version_follows_its_bytes(tmp_path: Path) -> None:
    files = sorted(FOLDER.rglob("*.txt"))
    assert len(files) >= 24
    chats = [f for f in files if "\n=== user" in f.read_text() or f.read_text().startswith("===")]
    for path in files:
        name = str(path.relative_to(FOLDER)).split(".v")[0]
        assert (read_prompt(name) if path in chats else read_list(name)) is not None
    for name in ("caption", "detection", "region_name", "refer", "count", "existence", "classify", "relation"):
        assert len(set(read_list(f"adapt/{name}")[0])) >= 5
    own = tmp_path / "llava"
    own.mkdir()
    (own / "detail.v2.txt").write_text("=== user\nSay $captions and $boxes.")
    mine = read_prompt("llava/detail", own=str(tmp_path))
    assert mine.messages(captions="this", boxes="that")[0].text == "Say this and that."
    assert mine.version != read_prompt("llava/detail").version
    (own / "detail.v10.txt").write_text("=== user\nSay $captions.")
    assert find("llava/detail", own=str(tmp_path)).name == "detail.v10.txt"
    with pytest.raises(DataError, match='Did you mean "llava/detail"'):
        read_prompt("llava/detial")


def test_every_domain_has_seeds_of_the_four_types() -> None:
    groups, _ = read_groups("mminstruct/domains")
    assert len(groups) == 24
    for domain, seeds in groups.items():
        assert Counter(seed.split(":")[0] for seed in seeds) == dict.fromkeys(
            ("judgement", "choice", "short", "long"), 1
        ), domain


def coco(folder: Path) -> Path:
    (folder / "images").mkdir()
    Image.new("RGB", (100, 50)).save(folder / "images" / "a.png")
    rows = {"images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 50}]}
    box = {
        "id": 1,
        "image_id": 7,
        "category_id": 3,
        "bbox": [10, 5, 20, 10],
        "iscrowd": 0,
        "attributes": {"color": "red"},
    }
    data = rows | {"categories": [{"id": 3, "name": "dog"}], "annotations": [box, box | {"id": 2, "iscrowd": 1}]}
    (folder / "instances_x.json").write_text(json.dumps(data))
    (folder / "captions_x.json").write_text(
        json.dumps(rows | {"annotations": [{"id": 1, "image_id": 7, "caption": " A\ndog "}]})
    )
    return folder


def test_a_view_joins_captions_and_normalised_boxes_without_crowds(tmp_path: Path) -> None:
    views = read_views([coco(tmp_path)], tmp_path / "images")
    dog = Thing("dog", (0.1, 0.1, 0.3, 0.3), {"color": "red"})
    assert views == [View("a", "a.png", ("A dog",), (dog,), crowds=("dog",))]
    assert View.of(json.loads(json.dumps(views[0].to_item()))) == views[0]
    assert views[0].boxes_text() == "red dog: [0.10, 0.10, 0.30, 0.30]"
    assert views[0].things[0].place == "top-left"
    assert [view.image for view in views_of_folder(tmp_path / "images")] == ["a.png"]


def test_annotations_that_do_not_fit_are_named(tmp_path: Path) -> None:
    coco(tmp_path)
    path = tmp_path / "instances_x.json"
    for change, words in (
        ({"category_id": 99}, "annotation 1 cannot be used"),
        ({"image_id": 8}, "annotation 1 cannot be used"),
        ({"bbox": ["x", 1, 2, 3]}, "annotation 1 cannot be used"),
    ):
        data = json.loads((tmp_path / "instances_x.json").read_text())
        data["annotations"][0] |= change
        (tmp_path / "broken.json").write_text(json.dumps(data))
        with pytest.raises(DataError, match=words):
            read_views([tmp_path / "broken.json"], tmp_path / "images")
    data = json.loads(path.read_text())
    for name, words in (("../../etc/passwd", "leads out"), ("b.png", "Check --images")):
        data["images"][0]["file_name"] = name
        (tmp_path / "broken.json").write_text(json.dumps(data))
        with pytest.raises(DataError, match=words):
            read_views([tmp_path / "broken.json"], tmp_path / "images")


def test_balancing_keeps_rare_concepts_whole_and_cuts_frequent_ones() -> None:
    assert noun_phrases("A small dog is standing on the red sofa.") == ["small dog", "red sofa"]
    captions = ["a dog"] * 300 + ["a heron"] * 5 + ["a quokka"] * 2 + ["a heron and a dog"] * 4
    kept = balance(captions, min_count=3, max_per_phrase=50)
    assert kept == balance(captions, min_count=3, max_per_phrase=50) == sorted(set(kept))
    words = Counter(captions[n] for n in kept)
    assert (words["a heron"], words["a heron and a dog"], words["a quokka"]) == (5, 4, 0)
    assert 46 <= words["a dog"] <= 50
    assert kept != balance(captions, min_count=3, max_per_phrase=50, seed=1)


def test_neighbours_are_those_of_a_plain_search_and_never_of_the_same_picture() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    groups = [str(n % 2) for n in range(60)]
    owners = [f"picture {n // 3}" for n in range(60)]
    found = neighbours(features, groups=groups, owners=owners, count=4)
    for row, numbers in enumerate(found):
        order = sorted(
            (n for n in range(60) if groups[n] == groups[row]),
            key=lambda n: (-round(float(features[n] @ features[row]), 6), n),
        )
        expected: list[int] = []
        for n in order:
            if owners[n] not in {owners[row], *(owners[e] for e in expected)} and len(expected) < 4:
                expected.append(n)
        assert numbers == expected


def test_like_texts_and_like_pictures_are_near(tmp_path: Path) -> None:
    rows = tfidf(["how many dogs are there", "how many cats are there", "describe the sky"])
    assert neighbours(rows, groups=["", "", ""], owners=["a", "b", "c"], count=1)[0] == [1]
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    for name, pixels in (("a", ramp), ("b", ramp // 2), ("c", ramp[:, ::-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    a, b, c = (average_hash(str(tmp_path / f"{name}.png")) for name in "abc")
    assert float(a @ b) == pytest.approx(1.0)
    assert float(a @ c) == pytest.approx(-1.0)


def test_a_key_changes_with_everything_that_decides_an_answer(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")

    def key(
        text: str = "x", images: tuple[str, ...] = (picture,), sample: int = 0, tokens: int = 5, **options: Any
    ) -> str:
        teacher: Teacher = OpenAIConfig(**({"base_url": "http://localhost/v1", "model": "m"} | options)).build()
        return teacher.key(Ask("t", (Message("user", text, images),), tokens, sample=sample))

    keys = [key(), key(text="y"), key(images=()), key(sample=1), key(tokens=6), key(model="n"), key(temperature=0.0)]
    assert len(set(keys)) == len(keys)
    assert key(concurrency=3, retries=1) == key()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    assert key() != keys[0]


def test_the_worst_case_bounds_any_tokenizer_that_reads_bytes() -> None:
    teacher: Teacher = OpenAIConfig(
        base_url="http://localhost/v1", model="m", usd_per_million_in=2, image_tokens=85
    ).build()
    text = "".join(chr(Random(n).randrange(32, 0x2FFF)) for n in range(300))
    assert teacher.most_tokens_in(Ask("t", (Message("user", text),), 5)) >= len(text.encode())
    assert teacher.limits.cost(1, 0) == 2000


def test_mistakes_in_settings_are_named(tmp_path: Path) -> None:
    for overrides, words in (
        (["recipe.sharse=1"], r"recipe\.sharse: unknown key.*Did you mean \"shares\""),
        (["recipe.type=lava"], 'unknown recipe "lava".*Did you mean "llava"'),
        (["budget_usd=-1"], "budget_usd"),
        (["budget=1"], r"budget: unknown key"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_settings(None, {"recipe": "llava", "out": str(tmp_path)}, overrides)
    (tmp_path / "s.yaml").write_text("recipe: {type: llava, max_tokens: 99}\nout: a\nseed: 3")
    read = read_settings(tmp_path / "s.yaml", {"out": "b", "recipe": "llava"}, ["seed=4"])
    assert (read.out, read.seed, read.recipe.max_tokens, read.teacher.type) == ("b", 4, 99, "annotations")


def test_the_engine_loads_no_heavy_library_before_it_is_needed() -> None:
    heavy = "{'torch', 'transformers', 'sklearn', 'httpx', 'diffusers', 'datasets'}"
    code = f"import sys, vlit.serve.synth, vlit.synth.teachers.openai; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_stage_gave_is_read_again_from_its_journal_as_often_as_asked(tmp_path: Path) -> None:
    store = StageStore(tmp_path, 1, "fill")
    given = {
        "a": [{"id": "a1", "n": 1}, {"id": "a2", "n": 2}],
        "b": [],
        "c": [{"id": "c1", "n": 3, "text": "é" * 70_000}],
    }
    for key, items in given.items():
        store.put(key, key, Outcome(items))
    found = JournalItems(store.path)
    for key, place in (("c", 0), ("a", 1), ("a", 0)):
        found.add(store.offset(key), place)
    store.put("d", "d", Outcome([{"id": "d1"}]))
    expected = [given["c"][0], given["a"][1], given["a"][0]]
    assert len(found) == 3
    assert list(found) == list(found) == expected
    store.close()
    first, second = iter(found), iter(found)
    assert [next(first), next(second), next(first)] == [expected[0], expected[0], expected[1]]
    odd = SelectedItems(Select("odd", ("n",), lambda c: [k for k, n in enumerate(c["n"]) if n % 2]), found)
    assert len(odd) == 2
    assert list(odd) == list(odd) == [given["c"][0], given["a"][0]]
