"""Which pictures the data engine opens and sends: those of the image folder that can be decoded, and of the rest nothing."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.spoilt_pictures import GREEN, SECRET, about, dots, empty, left_out, png, truncated
from tests.teacher_server import Server, running
from tests.tiny import build_encoder, build_llm
from vlit.config.schema import ModelConfig
from vlit.data.record import Record, read_records, write_records
from vlit.errors import DataError
from vlit.models.assemble import build_model
from vlit.models.interop.export_hf import export_hf
from vlit.registry import TEMPLATES
from vlit.synth.engine.calls import CallLog
from vlit.synth.engine.client import Client
from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.report import Report
from vlit.synth.engine.settings import read_settings
from vlit.synth.engine.teacher import Ask, Message
from vlit.synth.teachers.local import LocalConfig


def settings(server: Server, folder: Path, recipe: Any, **more: Any) -> dict[str, Any]:
    teacher = {
        "type": "openai", "base_url": server.url, "model": "m", "usd_per_million_in": 1, "usd_per_million_out": 4,
        "retries": 1, "backoff_s": 0.01,
    }  # fmt: skip
    return {
        "recipe": recipe, "images": str(folder / "mypics"), "out": str(folder / "out"), "teacher": teacher, "budget_usd": 5,
    } | more  # fmt: skip


def judged(server: Server, folder: Path, records: list[Record]) -> Report:
    write_records(folder / "data.jsonl", records)
    raw = settings(server, folder, "judge", records=[str(folder / "data.jsonl")])
    return run(read_settings(None, raw), show=False)


def sent_requests(folder: Path) -> int:
    """Requests that the journal of calls says have left."""
    lines = (folder / "out" / "calls.jsonl").read_text().splitlines()
    return sum("sent" in json.loads(line) for line in lines)


def pictures_sent(server: Server) -> list[Image.Image]:
    """Every picture that reached the endpoint."""
    found = []
    for body in server.accounts.bodies:
        for message in body["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
                    found.append(Image.open(io.BytesIO(data)))
    return found


def shows(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return all(
        abs(a - b) < 12 for a, b in zip(picture.convert("RGB").resize((1, 1)).getpixel((0, 0)), colour, strict=True)
    )


# References that lead out


def absolute(folder: Path) -> str:
    return str(folder / "outside" / "private.png")


def linked_file(folder: Path) -> str:
    (folder / "mypics" / "link.png").symlink_to(folder / "outside" / "private.png")
    return "link.png"


def linked_folder(folder: Path) -> str:
    (folder / "mypics" / "sub").symlink_to(folder / "outside")
    return "sub/private.png"


def linked_container(folder: Path) -> str:
    with tarfile.open(folder / "outside" / "shard.tar", "w") as tar:
        tar.add(folder / "outside" / "private.png", "private.png")
    (folder / "mypics" / "shard.tar").symlink_to(folder / "outside" / "shard.tar")
    return "shard.tar#private.png"


@pytest.mark.parametrize("refer", [absolute, linked_file, linked_folder, linked_container])
def test_a_record_that_leads_out_of_the_image_folder_sends_nothing_and_is_left_out_with_the_reason(
    tmp_path: Path, refer: Callable[[Path], str]
) -> None:
    png(tmp_path / "outside" / "private.png", SECRET)
    png(tmp_path / "mypics" / "good.png")
    with running(keep=True) as server:
        report = judged(server, tmp_path, [about("good.png", "good"), about(refer(tmp_path), "thief")])
        assert server.accounts.requests == sent_requests(tmp_path) == 1
        assert report.totals.spent == server.accounts.charged_nano > 0
        (picture,) = pictures_sent(server)
    assert shows(picture, GREEN)
    assert not shows(picture, SECRET)
    assert [record.id for record in read_records(tmp_path / "out" / "dataset.jsonl")] == ["good"]
    assert report.stages[0].rejected == {"picture": 1}
    (reason,) = left_out(tmp_path).values()
    assert reason.startswith("picture: image ")
    assert "private.png" in reason or "link.png" in reason or "shard.tar" in reason


def test_a_record_with_dots_is_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    png(tmp_path / "outside" / "private.png", SECRET)
    png(tmp_path / "mypics" / "good.png")
    line = {"id": "x", "image": "../outside/private.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}  # fmt: skip
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    with running() as server:
        raw = settings(server, tmp_path, "judge", records=[str(tmp_path / "data.jsonl")])
        with pytest.raises(DataError, match=r"data\.jsonl#0: .*leaves the image folder with \.\."):
            run(read_settings(None, raw), show=False)
        assert server.accounts.requests == 0


@pytest.mark.parametrize("recipe", ["minigpt4", "mminstruct"])
def test_recipes_that_begin_with_pictures_send_no_picture_behind_a_link(tmp_path: Path, recipe: str) -> None:
    png(tmp_path / "outside" / "private.png", SECRET)
    png(tmp_path / "mypics" / "good.png")
    linked_file(tmp_path)
    with running(keep=True) as server:
        run(read_settings(None, settings(server, tmp_path, recipe)), show=False)
        found = pictures_sent(server)
    assert found
    assert all(shows(picture, GREEN) for picture in found)
    assert "leads out of the image folder" in left_out(tmp_path)["link"]


def test_the_image_folder_may_be_a_link_and_absolute_paths_may_lie_in_it(tmp_path: Path) -> None:
    png(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "mypics").symlink_to(tmp_path / "elsewhere")
    with running(keep=True) as server:
        report = judged(server, tmp_path, [about("a.png", "a"), about(str(tmp_path / "mypics" / "a.png"), "b")])
        assert all(shows(picture, GREEN) for picture in pictures_sent(server))
    assert report.records == 2


def test_a_picture_in_a_container_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLIT_CACHE", str(tmp_path / "cache"))
    png(tmp_path / "0001.png")
    (tmp_path / "mypics").mkdir()
    with tarfile.open(tmp_path / "mypics" / "shard.tar", "w") as tar:
        tar.add(tmp_path / "0001.png", "0001.png")
    with running(keep=True) as server:
        report = judged(server, tmp_path, [about("shard.tar#0001.png", "in"), about("shard.tar#0002.png", "not in")])
        assert [shows(picture, GREEN) for picture in pictures_sent(server)] == [True]
    assert report.records == 1
    assert "0002.png" in left_out(tmp_path)["not in"]


# Pictures that cannot be used


def text(path: Path) -> None:
    path.write_text("This is no picture.")


def postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")


def missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder_of_that_name(path: Path) -> None:
    path.mkdir()


SPOILT = [truncated, empty, text, postscript, missing, pipe, folder_of_that_name]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_picture_that_cannot_be_used_costs_nothing_and_the_run_goes_on(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for name in names:
        png(tmp_path / "mypics" / name)
    (tmp_path / "mypics" / "b.jpg").unlink()
    spoil(tmp_path / "mypics" / "b.jpg")
    with running() as server:
        report = judged(server, tmp_path, [about(name, name[0]) for name in names])
        assert server.accounts.requests == sent_requests(tmp_path) == 1  # a and c are the same picture
        assert report.totals.spent == report.totals.committed == server.accounts.charged_nano > 0
        assert report.totals.failures == 0
    assert (report.records, report.unanswered) == (2, 0)
    assert left_out(tmp_path).keys() == {"b"}
    reason = left_out(tmp_path)["b"]
    assert reason.startswith("picture: ")
    assert str(tmp_path / "mypics" / "b.jpg") in reason


def test_a_mended_picture_is_asked_about_by_the_next_run_and_the_rest_is_not_asked_again(tmp_path: Path) -> None:
    png(tmp_path / "mypics" / "a.png")
    empty(tmp_path / "mypics" / "b.png")
    records = [about("a.png", "a"), about("b.png", "b")]
    with running() as server:
        assert judged(server, tmp_path, records).records == 1
        again = judged(server, tmp_path, records)
        assert (again.records, server.accounts.requests) == (1, 1)
        assert left_out(tmp_path).keys() == {"b"}
        png(tmp_path / "mypics" / "b.png", (200, 0, 0))
        mended = judged(server, tmp_path, records)
        assert (mended.records, server.accounts.requests) == (2, 2)
    assert left_out(tmp_path) == {}


@pytest.mark.parametrize("recipe", ["minigpt4", "mminstruct", "judge"])
def test_another_picture_under_the_same_name_is_asked_about_and_the_others_are_not(tmp_path: Path, recipe: str) -> None:
    names = {"a.png": GREEN, "b.png": (0, 0, 200)}
    for name, colour in names.items():
        png(tmp_path / "mypics" / name, colour)
    more: dict[str, Any] = {}
    if recipe == "judge":
        write_records(tmp_path / "data.jsonl", [about(name, name[0]) for name in names])
        more["records"] = [str(tmp_path / "data.jsonl")]
    with running(keep=True) as server:
        raw = settings(server, tmp_path, recipe, **more)
        run(read_settings(None, raw), show=False)
        first = len(pictures_sent(server))
        png(tmp_path / "mypics" / "a.png", (200, 0, 0))
        report = run(read_settings(None, raw), show=False)
        sent = pictures_sent(server)[first:]
    assert first >= 2
    assert len(sent) == first // 2
    assert all(shows(picture, (200, 0, 0)) for picture in sent)
    assert report.stages[0].reused == 1


@pytest.mark.parametrize("recipe", ["minigpt4", "mminstruct"])
def test_a_damaged_picture_takes_nothing_of_a_budget_that_fits_one_request(tmp_path: Path, recipe: str) -> None:
    png(tmp_path / "mypics" / "z.png")
    for number in range(5):
        truncated(tmp_path / "mypics" / f"{number}.png")
    with running() as server:
        report = run(read_settings(None, settings(server, tmp_path, recipe, budget_usd=0.05)), show=False)
        assert server.accounts.requests == sent_requests(tmp_path)
        assert report.totals.committed == server.accounts.charged_nano
    assert report.stages[0].rejected == {"picture": 5}
    assert report.stages[0].items_out == 1


def test_a_sent_picture_is_upright_and_small_and_shows_no_hidden_colour(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "mypics").mkdir()
    Image.new("RGB", (2400, 600), GREEN).save(tmp_path / "mypics" / "turned.jpg", exif=turned)
    Image.new("RGBA", (20, 20), (*SECRET, 0)).save(tmp_path / "mypics" / "clear.png")
    with running(keep=True) as server:
        judged(server, tmp_path, [about("turned.jpg", "a"), about("clear.png", "b")])
        found = {picture.size: picture for picture in pictures_sent(server)}
    assert found.keys() == {(128, 512), (20, 20)}
    assert shows(found[128, 512], GREEN)
    assert not shows(found[20, 20], SECRET)


def test_a_model_on_this_machine_is_not_even_loaded_for_a_damaged_picture(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    truncated(tmp_path / "a.png")
    log = CallLog(tmp_path / "calls.jsonl")
    asking = Client(LocalConfig(model=str(tmp_path / "model")).build(), log)
    with pytest.raises(Rejected, match=r"picture: .*a\.png"):
        asking.ask(Ask("caption", (Message("user", "Look.", (str(tmp_path / "a.png"),)),), 10))
    log.close()
    assert (tmp_path / "calls.jsonl").read_bytes() == b""


def test_a_transformers_model_on_this_machine_sees_the_picture_as_transformers_reads_it(
    tiny_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parts = {
        "encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip"))}, "connector": {"type": "mlp"},
        "llm": {"type": "hf", "path": str(build_llm("llama_gqa", tiny_dir / "llama_gqa"))},
    }  # fmt: skip
    export_hf(
        build_model(ModelConfig.model_validate(parts), dtype=torch.float32).eval(),
        tmp_path / "x",
        template=TEMPLATES.get("v1")(),
    )
    dots(tmp_path / "p" / "a.png", 1)
    message = Message("user", "Look.", (str(tmp_path / "p" / "a.png"),))
    teacher = LocalConfig(model=str(tmp_path / "x"), device="cpu").build()
    said = teacher.read(teacher.ready(Ask("caption", (message,), 12))()).text
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "x")
    content = [{"type": "image", "path": message.images[0]}, {"type": "text", "text": message.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert said == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() != ""
