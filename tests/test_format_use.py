"""Formats in use: training steps from every one of them, pictures inside of containers, ``vlit convert``, ``vlit doctor``."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data_fixtures import conversation, make_spec
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from tests.test_formats import CASES, FOLDER, format_of, records_of, root_of
from tests.tiny_run import tiny_run
from vlit.cli import main
from vlit.config.schema import DataConfig, DataSource
from vlit.data.doctor.scan import examine
from vlit.data.formats._base import BadRow, Row
from vlit.data.formats.mimicit import MimicItFormat
from vlit.data.formats.webdataset import WebDatasetFormat
from vlit.data.images import load_view, refusal, resolve_image
from vlit.data.json_stream import iter_json_members
from vlit.data.load import StepLoader
from vlit.data.members import MissingMember, split_member
from vlit.data.mixture import Mixture
from vlit.data.plain_pickle import load_plain
from vlit.data.record import read_records
from vlit.data.source import open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.models.assemble import model_spec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLIT_CACHE", str(tmp_path / "cache"))


def picture(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(held, kind)
    return held.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_step_trains_on_every_format(
    name: str, tokenizer_dir: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(template="llama3", cache_dir=str(tmp_path / "own"), max_tokens=2000)
    path, records = FOLDER / name / CASES[name]["path"], records_of(name)
    images = "" if "images" not in CASES[name] else str(root_of(name))
    source = DataSource(path=str(path), images=images, format=format_of(name, FOLDER / name))
    opened = open_source(source, data=data, seed=0, progress=False)
    assert len(opened) == len(records)
    tokenizer = SampleTokenizer(make_spec(tokenizer_dir("llama3")), data)
    loader = StepLoader(
        Mixture([opened], seed=0), tokenizer, data, global_batch=len(records), micro_batch_tokens=4000, total_steps=1,
        num_workers=0,
    )  # fmt: skip
    (step,) = list(loader)
    assert sorted(name for micro in step.micro_batches for name in micro.sample_ids) == sorted(r.id for r in records)
    assert sum(micro.num_images for micro in step.micro_batches) == sum(len(record.images) for record in records)
    assert sum(micro.num_label_tokens for micro in step.micro_batches) > 0
    assert step.quarantined == []
    if any("#" in image for record in records for image in record.images):
        assert any((tmp_path / "own" / "images").iterdir()), "copies lie where data.cache_dir says"
        assert not (tmp_path / "cache" / "images").exists()


def test_an_index_is_built_again_when_any_file_of_the_dataset_changes(tmp_path: Path) -> None:
    data = DataConfig(cache_dir=str(tmp_path / "own"))
    folder = tmp_path / "labels_set"
    for number in range(2):
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{number}.jpg").write_bytes(picture((number, 0, 0), "JPEG"))
        (folder / "labels" / f"{number}.json").write_text(json.dumps({"captions": [{"content": f"text {number}"}]}))
    source = DataSource(path=str(folder), format={"type": "cogvlm_sft"})
    first = open_source(source, data=data, seed=0, progress=False)
    again = open_source(source, data=data, seed=0, progress=False)
    assert first.content_hash == again.content_hash
    (folder / "labels" / "1.json").write_text(json.dumps({"captions": [{"content": "changed"}]}))
    changed = open_source(source, data=data, seed=0, progress=False)
    assert changed.content_hash != first.content_hash
    assert changed.sample(1).turns[-1].text == "changed"
    (folder / "labels" / "2.json").write_text(json.dumps({"captions": [{"content": "new"}]}))
    (folder / "images" / "2.jpg").write_bytes(picture((9, 9, 9), "JPEG"))
    assert len(open_source(source, data=data, seed=0, progress=False)) == 3


# --- pictures inside of containers ------------------------------------------------------------------------------------


def test_only_known_containers_split_a_reference() -> None:
    assert split_member("a/s.tar#b/c.jpg") == ("a/s.tar", "b/c.jpg")
    assert split_member("p.parquet#image:3:1") == ("p.parquet", "image:3:1")
    for plain in ("a.jpg", "a#b.jpg", "x.tar.gz#a", "tar#a", "s.tar", "s.tar#"):
        assert split_member(plain) is None, plain


@pytest.mark.parametrize(
    "image", ["../s.tar#a.jpg", "s.tar#../a.jpg", "s.tar#/etc/passwd", "s.tar#a/../../b", "s.tar#a\0"]
)
def test_a_reference_that_leads_out_is_refused_in_both_parts(image: str, tmp_path: Path) -> None:
    assert refusal(image)
    with pytest.raises(DataError):
        resolve_image(image, tmp_path)


def test_a_tar_gives_its_regular_members_and_nothing_else(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture((1, 2, 3)))
    path = write_tar(tmp_path / "s.tar", [("a.png", picture((200, 0, 0))), ("b/a.png", picture((0, 200, 0)))])
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    for name, colour in (("a.png", (200, 0, 0)), ("b/a.png", (0, 200, 0))):
        file = resolve_image(f"s.tar#{name}", tmp_path)
        assert file.is_relative_to(tmp_path / "cache" / "images")
        assert load_view(file, policy="squash", spec=make_spec("none"))[:, 16, 16].tolist() == list(colour)
    for name in ("link.png", "hard.png", "pipe.png", "none.png"):
        with pytest.raises(MissingMember, match="holds no image"):
            resolve_image(f"s.tar#{name}", tmp_path)


def test_a_container_outside_of_the_image_folder_is_refused_like_any_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.png", picture((1, 1, 1)))])
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "s.tar", tmp_path / "root" / "s.tar")
    with pytest.raises(DataError, match="leads out of the image folder"):
        resolve_image("s.tar#a.png", tmp_path / "root")
    assert resolve_image("s.tar#a.png", tmp_path / "root", follow_links=True).is_file()
    with pytest.raises(DataError, match="cannot be read"):
        resolve_image("none.tar#a.png", tmp_path / "root")


def test_a_changed_container_gives_its_new_pictures(tmp_path: Path) -> None:
    colours = []
    for colour in ((10, 0, 0), (250, 250, 250)):
        path = write_tar(tmp_path / "s.tar", [("a.png", picture(colour)), ("pad", bytes(colour[0]))])
        os.utime(path, ns=(colour[0] * 10**9, colour[0] * 10**9))
        view = load_view(resolve_image("s.tar#a.png", tmp_path), policy="squash", spec=make_spec("none"))
        colours.append(tuple(view[:, 16, 16].tolist()))
    assert colours == [(10, 0, 0), (250, 250, 250)]


def test_damaged_containers_are_errors_that_name_them(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", picture((1, 1, 1)) + bytes(4000))])
    path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "t.tar").write_bytes(b"not a tar" * 200)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "LA.json").write_text(json.dumps({"a": "%%%", "b": 7}))
    for image in ("s.tar#a.png", "t.tar#a.png", "p.parquet#image:0", "LA.json#a", "LA.json#b", "p.parquet#image"):
        with pytest.raises(DataError) as error:
            resolve_image(image, tmp_path)
        assert image.split("#")[0] in str(error.value), image


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_members_of_an_object_are_found_with_their_places(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlit.data.json_stream.CHUNK_BYTES", chunk)
    content = {
        "a": "x",
        'quote " and \\': {"n": [1, {"m": "}"}]},
        "": "], }",
        "é": base64.b64encode(bytes(99)).decode(),
    }
    for indent in (None, 2):
        path = tmp_path / "o.json"
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=False))
        raw = path.read_bytes()
        found = list(iter_json_members(path))
        assert {key: json.loads(value) for key, _, value in found} == content
        assert all(raw[begin : begin + len(value)] == value for _, begin, value in found)
    path.write_text("{}")
    assert list(iter_json_members(path)) == []
    for damaged in ('{"a": 1', "[1]", '{"a": 1]', "{1: 2}"):
        path.write_text(damaged)
        with pytest.raises(DataError):
            list(iter_json_members(path))


def test_an_example_that_is_no_record_makes_a_bad_row(tmp_path: Path) -> None:
    one = {"instruction": "q", "answer": "a", "image_ids": [], "rel_ins_ids": ["x"]}
    path = tmp_path / "SD_instructions.json"
    path.write_text(json.dumps({"meta": {}, "data": {"y": one, "x": {**one, "answer": ""}}}))
    assert len([row for row in MimicItFormat().iter_rows(path) if isinstance(row, Row)]) == 1
    bad = [row for row in MimicItFormat(in_context=2).iter_rows(path) if isinstance(row, BadRow)]
    assert [row.reason for row in bad] == ["example 'x': answer is empty", "answer is empty"]


def test_captions_are_cleaned_as_in_the_first_stage_of_minigpt4(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("0.jpg", b"x"), ("0.txt", b'A  Dog, (brown): "Rex"! ' + b"far " * 60)])
    (row,) = WebDatasetFormat(clean="blip").iter_rows(path)
    assert isinstance(row, Row)
    assert row.texts[1].startswith("a dog, brown rex far far")
    assert len(row.texts[1].split()) == 50


# --- pickles ----------------------------------------------------------------------------------------------------------


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / "refs.p"
        path.write_bytes(pickle.dumps([_Touch(tmp_path / "ran")], protocol))
        with pytest.raises(DataError, match=r"it names (posix|nt|os)\.mkdir"):
            load_plain(path)
    assert not (tmp_path / "ran").exists()
    for damaged in (b"", b"\x80\x02]q", b"garbage", pickle.dumps([1, "a"])[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged"):
            load_plain(path)
    path.write_bytes(pickle.dumps([{"a": 1, "b": [0.5, None, True, "x"]}], 2))
    assert load_plain(path) == [{"a": 1, "b": [0.5, None, True, "x"]}]


# --- vlit doctor ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_looks_into_containers_and_at_formats_that_are_no_json(tiny_dir: Path, tmp_path: Path) -> None:
    sound, cut = picture((9, 9, 9)), picture((8, 8, 8))[:-30]
    members = [("0.png", sound), ("0.txt", b"sound"), ("1.png", cut), ("1.txt", b"cut"), ("2.png", sound)]
    shard = write_tar(tmp_path / "s.tar", members)
    data = f"stages.instruct.data=[{{path: {shard}, name: shards, format: webdataset}}]"
    run = tiny_run(tiny_dir, tmp_path / "out", "stages.align=null", data, "data.on_bad_sample=quarantine")
    out = tmp_path / "out" / "doctor"
    found = examine(run, model_spec(run.model), stages=["instruct"], out=out, workers=1, progress=False)
    assert found.unreadable == []
    assert found.summary["images"] == 2
    listed = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(entry["record"], entry["check"]) for entry in listed] == [(1, "image_damaged"), (2, "fields")]
    assert "sample '2' has no caption" in listed[1]["reason"]


# --- vlit convert -----------------------------------------------------------------------------------------------------


def test_convert_writes_llava_and_parquet_that_hold_the_same(tmp_path: Path) -> None:
    shards, out = FOLDER / "webdataset" / "shards", tmp_path / "out.jsonl"
    assert main(["convert", "--from", "webdataset", str(shards), str(out)]) == 0
    assert list(read_records(out)) == records_of("webdataset")
    table = tmp_path / "out.parquet"
    assert main(["convert", "--from", "llava", "--to", "parquet", "--images", str(shards), str(out), str(table)]) == 0
    back = tmp_path / "back.json"
    assert main(["convert", "--from", "parquet", str(table), str(back)]) == 0
    assert [record.turns for record in read_records(back)] == [record.turns for record in records_of("webdataset")]
    assert all(record.images[0].startswith("out.parquet#images:") for record in read_records(back))


def test_convert_takes_settings_of_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(FOLDER / "qwen_vl" / "train.json"), str(tmp_path / "out.jsonl")
    assert main(["convert", "--from", "qwen_vl", source, out, "boxes=cogvlm", "picture_names=true"]) == 0
    texts = [turn.text for record in read_records(Path(out)) for turn in record.turns]
    assert "the dog [[120,300,501,999]]" in texts
    assert "Picture 1: <image>\nFind the dog." in texts
    for wrong in ("boxes=qwn", "picture_name=true", "boxes"):
        assert main(["convert", "--from", "qwen_vl", source, out, wrong]) == 2
    said = capsys.readouterr().err
    assert 'unknown box form "qwn"' in said
    assert 'Did you mean "picture_names"?' in said


def test_convert_refuses_bad_records_or_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"id": str(n), "conversations": conversation("q", "a")} for n in range(40)]
    bad = {"id": "b", "image": "x.png", "conversations": conversation("q", "a")}
    path, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    path.write_text(json.dumps([*good[:7], bad, *good[7:]]))
    assert main(["convert", "--from", "llava", str(path), str(out)]) == 2
    assert 'in.json#7 (id "b"): the text has 0 <image> placeholders' in capsys.readouterr().err
    assert not out.exists()
    command = ["convert", "--from", "llava", str(path), str(out), "--on-bad-record", "quarantine"]
    assert main(command) == 2
    assert "1 of 41 records are quarantined (2.44%)" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["in.json"]
    assert main([*command, "--quarantine-budget", "0.05"]) == 0
    assert "bad      1  placeholders" in capsys.readouterr().err
    (entry,) = [json.loads(line) for line in (tmp_path / "out.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert (entry["record"], entry["id"]) == (7, "b")
    assert len(list(read_records(out))) == 40


def test_pixels_survive_two_conversions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    records = [{"id": str(n), "image": "a.png", "conversations": conversation("<image>\nq", "a")} for n in range(150)]
    (tmp_path / "in.json").write_text(json.dumps(records))
    table = tmp_path / "out.parquet"
    assert main(["convert", "--from", "llava", "--to", "parquet", str(tmp_path / "in.json"), str(table)]) == 0
    for number in (0, 63, 64, 149):
        copy = resolve_image(f"out.parquet#images:{number}:0", tmp_path)
        assert copy.read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(MissingMember):
        resolve_image("out.parquet#images:150:0", tmp_path)
