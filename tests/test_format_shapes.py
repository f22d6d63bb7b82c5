"""The other published shapes and settings of formats that have several."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tests.data_fixtures import conversation
from tests.test_formats import CASES, FOLDER, picture_bytes, records_of
from vlit.data.formats._base import Row, record_of
from vlit.data.formats.coco import read_coco
from vlit.data.images import resolve_image
from vlit.data.record import Record, Region
from vlit.errors import DataError
from vlit.registry import FORMATS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLIT_CACHE", str(tmp_path / "cache"))


def read(name: str, path: Path, **settings: Any) -> list[Record]:
    rows = list(FORMATS.get(name)(type=name, **settings).iter_rows(path))
    assert all(isinstance(row, Row) for row in rows), rows
    return [record_of(row) for row in rows if isinstance(row, Row)]


def exchange(record: Record) -> list[str]:
    return [turn.text for turn in record.turns]


def test_coco_captions_are_one_record_each() -> None:
    (record,) = read("coco", FOLDER / "coco" / "captions_train2017.json", image_name="train2017/{file_name}")
    assert (record.id, record.images, record.kind) == ("48", ("train2017/000000000009.jpg",), "caption")
    assert exchange(record)[1] == "A bowl of soup on a mat."
    with pytest.raises(DataError, match="holds captions, no instances"):
        read("coco", FOLDER / "coco" / "captions_train2017.json", task="detection")
    (record,) = read("coco", FOLDER / "coco" / "captions_train2017.json", image_name="{id:012d}.jpg")
    assert record.images == ("000000000009.jpg",)


def test_objects_are_named_in_each_model_s_own_way() -> None:
    path = FOLDER / "coco" / "instances_train2017.json"
    answers = {form: exchange(read("coco", path, boxes=form)[1])[1] for form in ("minigpt_v2", "qwen_vl", "shikra")}
    assert answers == {
        "minigpt_v2": "<p>person</p> {<50><25><75><75>}",
        "qwen_vl": "<ref>person</ref><box>(500,250),(749,749)</box>",
        "shikra": "person [0.500,0.250,0.750,0.750]",
    }


def test_regions_are_described_as_well_as_located() -> None:
    (record,) = read("refcoco", FOLDER / "refcoco" / "refs(unc).p", task="describe", boxes="cogvlm")
    assert exchange(record)[:2] == [
        "<image>\nDescribe the region [[100,100,500,600]] in a few words.", "the lady with the blue shirt",
    ]  # fmt: skip
    assert read("refcoco", FOLDER / "refcoco" / "refs.json") == records_of("refcoco")
    assert [r.id for r in read("refcoco", FOLDER / "refcoco" / "refs.json", split="testA")] == ["1"]
    assert len(read("refcoco", FOLDER / "refcoco" / "refs.json", split="all")) == 2


def test_visual_genome_answers_questions_and_takes_the_first_regions() -> None:
    folder = FOLDER / "visual_genome"
    (record,) = read("visual_genome", folder / "question_answers.json")
    assert record.images == ("VG_100K_2/1.jpg",)
    assert exchange(record)[1] == "Green."
    assert [len(r.regions) for r in read("visual_genome", folder / "region_descriptions.json", max_per_image=1)] == [
        1,
        1,
    ]


def test_ok_vqa_s_files_find_each_other(tmp_path: Path) -> None:
    questions = {"questions": [{"image_id": 51606, "question": "What is the hairstyle?", "question_id": 516065}]}
    answers = [
        {"answer": "pony tail", "raw_answer": "ponytail", "answer_confidence": "yes", "answer_id": n} for n in (1, 2)
    ]
    given = {"annotations": [{"image_id": 51606, "answers": answers, "question_id": 516065, "answer_type": "other"}]}
    (tmp_path / "OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(questions))
    (tmp_path / "mscoco_train2014_annotations.json").write_text(json.dumps(given))
    path = tmp_path / "OpenEnded_mscoco_train2014_questions.json"
    (record,) = read("vqav2", path, suffix="")
    assert exchange(record) == ["<image>\nWhat is the hairstyle?", "pony tail"]
    assert record.images == ("COCO_train2014_000000051606.jpg",)
    shutil.move(path, tmp_path / "other.json")
    with pytest.raises(DataError, match=r"set format\.annotations"):
        read("vqav2", tmp_path / "other.json")


def test_answers_come_in_the_form_that_is_asked_for() -> None:
    letter = read("scienceqa", FOLDER / "scienceqa" / "problems.json", answer="letter")
    assert [exchange(r)[1] for r in letter] == ["A", "A"]
    assert exchange(letter[0])[0].endswith("B. rain\nAnswer with the option's letter from the given choices directly.")
    assert [r.id for r in read("scienceqa", FOLDER / "scienceqa" / "problems.json", split="test")] == ["3"]
    full = read("gqa", FOLDER / "gqa" / "train_balanced_questions.json", answer="full")
    assert exchange(full[1]) == ["<image>\nWhat is on the wall?", "The pipe is on the wall."]
    covers = read("ocrvqa", FOLDER / "ocrvqa" / "dataset.json", split="test")
    assert [exchange(r)[1] for r in covers] == ["No"]


def test_book_covers_end_as_their_addresses_do(tmp_path: Path) -> None:
    """As OCR-VQA's loadDataset.py saves them: ``os.path.splitext(imageURL)[1]`` behind the id."""
    one = {"questions": ["Who?"], "answers": ["A."], "split": 1}
    addresses = {"7": "http://x.org/51.gif", "8": "http://x.org/a.b.jpg", "9": None}
    (tmp_path / "dataset.json").write_text(json.dumps({n: {**one, "imageURL": url} for n, url in addresses.items()}))
    assert [r.images for r in read("ocrvqa", tmp_path / "dataset.json")] == [("7.gif",), ("8.jpg",), ("9.jpg",)]
    all_jpeg = read("ocrvqa", tmp_path / "dataset.json", image_name="ocr/{id}.jpg")
    assert [r.images for r in all_jpeg] == [("ocr/7.jpg",), ("ocr/8.jpg",), ("ocr/9.jpg",)]


def test_a_wrong_pattern_of_image_names_is_told_when_the_configuration_is_read() -> None:
    patterned = [name for name in FORMATS.names() if "image_name" in FORMATS.get(name).model_fields]
    assert len(patterned) >= 10
    for name in patterned:
        number = "{id:s}" if name == "coco" else "{id:d}"  # COCO's ids are numbers, others are texts
        for pattern in ("{image_id}.jpg", "{}.jpg", "{id.real}", "{id[0]}", "{id", "{id!x}", number):
            with pytest.raises(ValidationError, match=r'image_name\n .*pattern "\{.*": .*id'):
                FORMATS.get(name)(type=name, image_name=pattern)
        FORMATS.get(name)(type=name, image_name="a/{id:0>12}.jpg")
    with pytest.raises(ValidationError, match=r"unknown field image_id\. Known: file_name, id\."):
        FORMATS.get("coco")(type="coco", image_name="{image_id}")


def test_mimic_it_without_examples_is_one_exchange_each() -> None:
    records = read("mimicit", FOLDER / "mimicit" / "LA_instructions.json")
    assert [(len(r.turns), len(r.images), r.kind) for r in records] == [
        (2, 1, "image"),
        (2, 2, "images"),
        (2, 0, "text"),
    ]


def test_a_single_file_of_mminstruct_and_a_whole_one_without_domain(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "conversations": conversation("<image>\nq", "a")}
    for name, domain, kind in (("qa_en", None, "qa"), ("caption_cn", None, "caption"), ("chart_en", "chart", "qa")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        assert [(r.domain, r.kind) for r in read("mminstruct", path)] == [(domain, kind)], name


def test_mminstruct_s_root_folder_is_not_read_twice_and_ids_are_unique(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "conversations": conversation("<image>\nq", "a")}
    domains = tmp_path / "jsons_per_domain"
    for name in ("qa_per_domain/artwork_en", "caption_per_domain/artwork_en", "qa_per_domain/map_en"):
        (domains / name).parent.mkdir(parents=True, exist_ok=True)
        (domains / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    expected = [
        ("caption_per_domain/artwork_en/0", "artwork", "caption"), ("caption_per_domain/artwork_en/1", "artwork", "caption"),
        ("qa_per_domain/artwork_en/0", "artwork", "qa"), ("qa_per_domain/artwork_en/1", "artwork", "qa"),
        ("map_en/0", "map", "qa"), ("map_en/1", "map", "qa"),
    ]  # fmt: skip
    assert [(r.id, r.domain, r.kind) for r in read("mminstruct", domains)] == expected
    (tmp_path / "jsons_all").mkdir()
    (tmp_path / "jsons_all" / "qa_en.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"holds jsons_all and jsons_per_domain, which have the same rows\. Name one"):
        read("mminstruct", tmp_path)


def test_multiinstruct_without_sizes_keeps_pixels() -> None:
    record = read("multiinstruct", FOLDER / "multiinstruct" / "train.jsonl")[0]
    assert "Region 2 1.5 4 3" in exchange(record)[0]
    assert record.regions == ()


def test_boxes_of_texts_are_rewritten_and_regions_stay() -> None:
    kept, moved = (
        read("minigpt_v2", FOLDER / "minigpt_v2" / "grounded.json", boxes=form)[1] for form in ("keep", "llava")
    )
    assert exchange(kept)[1] == "<p>Four men</p> {<10><20><90><70>}"
    assert exchange(moved)[1] == "Four men [0.10, 0.20, 0.90, 0.70]"
    assert kept.regions == moved.regions == (Region("Four men", (0.1, 0.2, 0.9, 0.7)),)


def test_tables_of_pairs_paths_and_plain_bytes(tmp_path: Path) -> None:
    image = picture_bytes()
    pairs = [
        {"user": "What?", "assistant": "A tile.", "source": "s"},
        {"user": "Sure?", "assistant": "Yes.", "source": "s"},
    ]
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, row in (
        ("train-00000-of-00002", {"texts": pairs, "images": [{"bytes": image, "path": None}]}),
        ("train-00001-of-00002", {"texts": pairs[:1], "images": []}),
        ("test-00000-of-00001", {"texts": pairs, "images": []}),
    ):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
    records = read("hf_datasets", tmp_path / "set")
    assert [exchange(r) for r in records] == [["<image>\nWhat?", "A tile.", "Sure?", "Yes."], ["What?", "A tile."]]
    assert resolve_image(records[0].images[0], tmp_path / "set").read_bytes() == image
    assert len(read("hf_datasets", tmp_path / "set", split="test")) == 1
    pq.write_table(pa.Table.from_pylist([{"messages": chat, "picture": image}]), tmp_path / "b.parquet")
    (record,) = read("parquet", tmp_path / "b.parquet", image="picture")
    assert record.images == ("b.parquet#picture:0",)
    assert resolve_image(record.images[0], tmp_path).read_bytes() == image
    pq.write_table(pa.Table.from_pylist([{"q": "What?", "a": "This.", "image": "a/b.jpg"}]), tmp_path / "c.parquet")
    (record,) = read("parquet", tmp_path / "c.parquet", question="q", answer="a")
    assert (record.images, exchange(record)) == (("a/b.jpg",), ["<image>\nWhat?", "This."])


def test_shards_in_folders_are_read_and_compressed_ones_refused(tmp_path: Path) -> None:
    def shard(name: str, mode: Literal["w", "w:gz"] = "w") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, mode) as tar:
            for member, content in (("0.png", picture_bytes()), ("0.txt", name.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    for name in ("1.tar", "a/1.tar", "a/0.tar"):
        shard(name)
    records = read("webdataset", tmp_path)
    assert [(r.id, exchange(r)[1]) for r in records] == [
        ("1.tar#0", "1.tar"), ("a/0.tar#0", "a/0.tar"), ("a/1.tar#0", "a/1.tar"),
    ]  # fmt: skip
    assert all(resolve_image(r.images[0], tmp_path).read_bytes() == picture_bytes() for r in records)
    for name in ("2.tar.gz", "a/3.TGZ", "a/4.tgz"):
        compressed = shard(name, "w:gz")
        for path in (tmp_path, compressed) if name.islower() else (compressed,):
            with pytest.raises(DataError, match=rf"{name}: tars must be uncompressed\. Run gunzip"):
                read("webdataset", path)
        compressed.unlink()


def test_a_table_s_messages_may_be_lists_of_parts(tmp_path: Path) -> None:
    """As LLaVA sets of the Hub have them: every part has every key, and pictures lie in a column of their own."""
    image, none = picture_bytes(), {"index": None, "text": None, "image": None}
    asked = [{**none, "text": "What is this?", "type": "text"}, {**none, "index": 0, "type": "image"}]
    answered = [{**none, "text": "A tile.", "type": "text"}]
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    inline = [{"role": "user", "content": [{**asked[1], "image": "a/b.png"}, asked[0]]}, chat[1]]
    rows = [{"messages": chat, "images": [{"bytes": image, "path": None}]}, {"messages": inline, "images": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    listed, named = read("parquet", tmp_path / "a.parquet")
    assert exchange(listed) == ["What is this?\n<image>", "A tile."]
    assert resolve_image(listed.images[0], tmp_path).read_bytes() == image
    assert (exchange(named), named.images) == (["<image>\nWhat is this?", "A tile."], ("a/b.png",))


def test_the_column_that_holds_the_picture_is_taken(tmp_path: Path) -> None:
    image = picture_bytes()
    rows = [
        {"question": "q", "answer": "a", "images": images, "image": one}
        for images, one in (([], image), (None, image), ([image], None), ([], None))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = read("parquet", tmp_path / "a.parquet")
    assert [r.images for r in records] == [
        ("a.parquet#image:0",), ("a.parquet#image:1",), ("a.parquet#images:2:0",), (),
    ]  # fmt: skip
    assert all(resolve_image(name, tmp_path).read_bytes() == image for r in records for name in r.images)


def test_files_that_are_read_whole_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    looked_at = 0
    for name in ("coco", "gqa", "minigpt4", "scienceqa", "cogvlm_sft", "mimicit", "visual_genome"):
        folder = shutil.copytree(FOLDER / name, tmp_path / name)
        for file in folder.rglob("*.json"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
            looked_at += 1
        settings = {**CASES[name].get("format", {})}
        assert read(name, folder / CASES[name]["path"], **settings) == records_of(name), name
    assert read_coco(tmp_path / "coco" / "instances_train2017.json").annotations
    assert looked_at > 10


@pytest.mark.parametrize("name", ["llava", "sharegpt", "coco", "vqav2", "mimicit"])
def test_a_compressed_file_is_one_error_that_says_how_to_uncompress_it(name: str, tmp_path: Path) -> None:
    file = FOLDER / name / CASES[name]["path"]
    packed = tmp_path / f"{file.name}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(
        DataError, match=rf"the file is compressed \(gzip\)\. Uncompress it \(gunzip -k {packed.name}\)"
    ):
        read(name, packed)


def test_a_wrong_path_says_what_the_format_reads(tmp_path: Path) -> None:
    for name in sorted(CASES):
        with pytest.raises(DataError) as error:
            list(FORMATS.get(name)(type=name).iter_rows(tmp_path / "nowhere.json"))
        assert str(tmp_path) in str(error.value), name
