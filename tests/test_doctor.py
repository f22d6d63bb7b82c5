"""``vlit doctor`` finds what was planted and nothing else, survives its workers, and training honours what it wrote."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from rich.console import Console

import tests.doctor_templates  # noqa: F401  (registers a template)
from tests.html_tools import assert_self_contained, parse
from tests.scale.doctor_665k import World, differences, read_manifest, write_config
from tests.tiny_run import tiny_run
from vlit.cli import main
from vlit.config.schema import DataConfig, RunConfig
from vlit.data.doctor.checks import CHECKS, Finding, severity_of
from vlit.data.doctor.image_file import look_at
from vlit.data.doctor.manifest import manifest_of, use_of
from vlit.data.doctor.pool import run_job
from vlit.data.doctor.records import LengthBound, RecordJob, Rows, read_samples
from vlit.data.doctor.scan import Diagnosis, examine
from vlit.data.images import load_view, resolve_image
from vlit.data.source import open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.models.assemble import model_spec
from vlit.serve.doctor_page import build_page, findings_table
from vlit.train.identity import open_mixture, stage_identity
from vlit.types import Sample, Turn

ROOT = Path(__file__).resolve().parent.parent
EVIL = '<img src=x onerror="alert(1)">'


# --- one image --------------------------------------------------------------------------------------------------------


def pixels(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or pixels()).save(buffer, kind, **options)
    return buffer.getvalue()


def checks_of(path: Path, **options: Any) -> list[str]:
    return [finding.check for finding in look_at(path, shown=path.name, **options)]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [pixels().convert("P"), pixels().rotate(180).convert("P")]
    return encoded(kind, frames[0], save_all=True, append_images=frames[1:])


FILES: list[tuple[str, bytes, list[str]]] = [
    ("sound.jpg", encoded("JPEG"), []),
    ("sound.JPEG", encoded("JPEG", progressive=True), []),
    ("sound.png", encoded("PNG"), []),
    ("sound.webp", encoded("WEBP"), []),
    ("sound.bmp", encoded("BMP"), []),
    ("grey.png", encoded("PNG", pixels().convert("L")), []),
    ("name without extension", encoded("PNG"), []),
    ("empty.jpg", b"", ["image_empty"]),
    ("page.jpg", b"<!DOCTYPE html><html>404</html>", ["image_not_image"]),
    ("note.png", b"version https://git-lfs.github.com/spec/v1", ["image_not_image"]),
    ("cut.jpg", encoded("JPEG")[:-100], ["image_damaged"]),
    ("header.jpg", encoded("JPEG")[:7], ["image_damaged"]),
    ("cut.png", encoded("PNG")[:-100], ["image_damaged"]),
    ("noise.png", encoded("PNG")[:60] + bytes(range(256)) * 8, ["image_damaged"]),
    ("zeros.jpg", encoded("JPEG")[:700] + bytes(3000), ["image_damaged"]),
    ("bomb.png", World(Path(), records=0, images=0, faults=0)._bomb(), ["image_too_large"]),
    ("is_png.jpg", encoded("PNG"), ["image_extension"]),
    ("is_jpeg.png", encoded("JPEG"), ["image_extension"]),
    ("cmyk.jpg", encoded("JPEG", pixels().convert("CMYK")), ["image_cmyk"]),
    ("palette.png", encoded("PNG", pixels().convert("P")), ["image_palette"]),
    ("deep.png", encoded("PNG", Image.fromarray(np.full((9, 9), 40_000, np.uint16))), ["image_deep"]),
    ("alpha.png", encoded("PNG", pixels().convert("RGBA")), ["image_transparent"]),
    ("frames.gif", animated("GIF"), ["image_palette", "image_animated"]),
    ("frames.webp", animated("WEBP"), ["image_animated"]),
    ("turned.jpg", rotated(), ["image_rotated"]),
    ("dot.png", encoded("PNG", pixels(1, 1)), ["image_tiny"]),
    ("strip.png", encoded("PNG", pixels(640, 8)), ["image_strip"]),
    ("no_end.png", encoded("PNG")[:-12], ["image_unfinished"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=[name for name, _, _ in FILES])
def test_an_image_file_gets_its_findings_and_no_others(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert checks_of(path) == expected


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, c, _ in FILES], ids=[name for name, _, _ in FILES])
def test_an_error_is_what_training_would_refuse(tiny_spec: Any, tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        view = load_view(path, policy="pad", spec=tiny_spec)
        assert view.shape[0] == 3
        refused = False
    except DataError:
        refused = True
    assert any(severity_of(check) == "error" for check in checks_of(path)) == refused


@pytest.fixture(scope="module")
def tiny_spec(tiny_dir: Path) -> Any:
    return model_spec(tiny_run(tiny_dir, tiny_dir / "unused").model)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    assert checks_of(tmp_path / "folder.jpg") == ["image_no_file"]
    assert checks_of(tmp_path / "pipe.jpg") == ["image_no_file"]  # without waiting for a writer
    assert checks_of(tmp_path / "dangling.jpg") == ["image_missing"]
    assert checks_of(tmp_path / "absent" / "a.jpg") == ["image_missing"]


def test_a_missing_image_names_the_file_with_another_extension(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "b.JPG").write_bytes(encoded("JPEG"))
    (found,) = look_at(tmp_path / "a.jpg", shown="a.jpg")
    assert found == Finding("image_missing", "image 'a.jpg' does not exist, a.png exists")
    (found,) = look_at(tmp_path / "b.gif", shown="b.gif")
    assert found.reason.endswith(", b.JPG exists")
    (found,) = look_at(tmp_path / "c.jpg", shown="c.jpg")
    assert found.reason.endswith("does not exist")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_at_any_byte_never_passes_for_a_whole_one(tmp_path: Path, kind: str) -> None:
    content = encoded(kind, pixels(24, 16) if kind != "GIF" else pixels(24, 16).convert("P"))
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(content)
    whole = checks_of(path)
    assert not any(severity_of(check) == "error" for check in whole)
    passed = []
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        if checks_of(path) == whole:
            passed.append(length)
    assert passed == []


def test_headers_alone_find_bombs_and_web_pages_but_not_cut_files(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.jpg", encoded("JPEG")[:-100], []),
        ("b.jpg", b"<html>", ["image_not_image"]),
        ("c.png", World(Path(), records=0, images=0, faults=0)._bomb(), ["image_too_large"]),
    ):
        (tmp_path / name).write_bytes(content)
        assert checks_of(tmp_path / name, decode=False) == expected


def test_links_that_lead_out_of_the_image_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "real"
    (root / "inside").mkdir(parents=True)
    outside.mkdir()
    for folder in (outside, root / "inside"):
        (folder / "a.png").write_bytes(encoded("PNG"))
    (root / "file_out.png").symlink_to(outside / "a.png")
    (root / "folder_out").symlink_to(outside)
    (root / "file_in.png").symlink_to("inside/a.png")
    (root / "folder_in").symlink_to("inside")
    (tmp_path / "linked").symlink_to(root)
    for folder in (root, tmp_path / "linked"):  # the image folder itself may be a link
        for name in ("inside/a.png", "file_in.png", "folder_in/a.png", "absent.png"):
            assert resolve_image(name, folder) == folder / name
        for name in ("file_out.png", "folder_out/a.png"):
            with pytest.raises(DataError, match=r"leads out of the image folder .* data.follow_links: true"):
                resolve_image(name, folder)
            assert resolve_image(name, folder, follow_links=True).is_file()


# --- records ----------------------------------------------------------------------------------------------------------


def sample(*texts: str, images: tuple[str, ...] = (), id: str = "a") -> Sample:
    roles: Any = ("user", "assistant")
    return Sample(id=id, source="", turns=tuple(Turn(roles[n % 2], t) for n, t in enumerate(texts)), images=images)


def record_job(tiny_spec: Any, **rules: Any) -> RecordJob:
    job = RecordJob([""], [SampleTokenizer(tiny_spec, DataConfig(**rules))])
    job._bounds[0] = LengthBound(job.tokenizers[0])
    return job


def test_records_that_do_not_fit_are_told_apart(tiny_spec: Any) -> None:
    job = record_job(tiny_spec, max_tokens=200)
    long = "what is this " * 200

    def checks(*texts: str) -> list[str]:
        return [finding.check for finding in job.look(sample(*texts))]

    assert checks("What?", "A tile.") == []
    assert checks("Was ist das für ein Bäcker?", "Ein schöner.") == []  # not ASCII: tokenised to know
    assert checks("What?", "A tile.", long, "Yes.") == ["drops_turns"]
    assert checks("What?", long) == ["cuts_answer"]
    assert checks(long, "A tile.") == ["no_supervision"]
    (found,) = job.look(sample("a", "b", "c " * 400, "d"))
    assert found.reason == "2 of 4 turns do not fit into max_tokens 200"


def test_a_template_that_cannot_hold_a_record_is_a_finding_of_it(tiny_spec: Any) -> None:
    job = record_job(tiny_spec, template="plain")
    assert job.look(sample("What?", "A tile.")) == []
    (found,) = job.look(sample("What?", "A tile.", "Sure?", "Yes."))
    assert found.check == "template"
    assert "one question and one answer" in found.reason


@pytest.mark.parametrize("template", ["v1", "plain", "chatml", "llama3"])
def test_the_length_bound_is_never_wrong(tiny_spec: Any, template: str) -> None:
    tokenizer = SampleTokenizer(tiny_spec, DataConfig(template=template, max_tokens=400))
    bound = LengthBound(tokenizer)
    generator = np.random.default_rng(0)
    letters = [*map(chr, range(32, 127)), "\n", "é", "漢", "</s>", "<|im_end|>", "   "]
    sure = 0
    for _ in range(400):
        texts = ["".join(generator.choice(letters, size=generator.integers(1, 60))) or "a" for _ in range(2)]
        texts = [text if text.strip() else "a" for text in texts]
        record = sample(*(["<image>", *texts[1:]] if generator.random() < 0.3 else texts))
        images = sum(turn.text.count("<image>") for turn in record.turns)
        record = sample(*(turn.text for turn in record.turns), images=("a.png",) * images)
        if bound.surely_fits(record):
            tokens = tokenizer.tokenize(record)
            assert tokens.dropped_turns == tokens.cut_tokens == 0
            assert tokens.num_label_tokens > 0
            sure += 1
    assert 40 < sure < 400


def test_bulk_reading_gives_the_records_of_the_index(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    source = open_mixture(run, "instruct", progress=False).sources[0]
    table = source.rows.table()
    for start, stop in ((0, len(source)), (3, 11), (7, 8), (5, 5)):
        read = list(read_samples(table, start, stop, source.name))
        assert read == [source.sample(row) for row in range(start, stop)]
    rows = Rows(2, 10, 20)
    assert (len(rows), rows[:3], rows[4:], rows[3]) == (10, Rows(2, 10, 13), Rows(2, 14, 20), 13)


# --- workers that die -------------------------------------------------------------------------------------------------


class FragileJob:
    """Items are words: ``kill``, ``segfault``, ``once:<marker file>``, ``sleep``, ``raise``; others give nothing."""

    def start(self) -> None:
        pass

    def begin(self, task: Any) -> Any:
        return task

    def look(self, item: str) -> list[Finding]:
        if item == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == "sleep":
            time.sleep(3600)
        if item == "raise":
            raise RuntimeError("no luck")
        if item.startswith("once:") and not Path(item[5:]).exists():
            Path(item[5:]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [Finding("image_tiny", item)] if item == "odd" else []

    def end(self) -> None:
        return None


class HopelessJob(FragileJob):
    def start(self) -> None:
        raise DataError("the tokenizer is not there")


class DyingJob(FragileJob):
    def start(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_worker_is_the_finding_of_the_item_it_looked_at(tmp_path: Path) -> None:
    once = f"once:{tmp_path / 'marker'}"
    words = ["a", "kill", "odd", "b", "segfault", "c", once, "odd", "sleep", "raise", "d", "odd"]
    tasks = [words[at : at + 5] for at in range(0, len(words), 5)]
    found: dict[str, list[str]] = {}
    looked: list[str] = []
    for done in run_job(FragileJob(), tasks, workers=2, stuck_after_s=2):
        looked += done.task
        for place, findings in done.found:
            found.setdefault(done.task[place], []).extend(f"{f.check}: {f.reason}" for f in findings)
    assert sorted(looked) == sorted(words)  # each is accounted for, none twice
    assert found.pop("odd") == ["image_tiny: odd"] * 3
    assert found.pop("raise") == ["crash: RuntimeError: no luck"]
    assert found.pop("kill")[0].startswith("crash: the process that looked at it died, twice: SIGKILL")
    assert found.pop("segfault") == ["crash: the process that looked at it died, twice: SIGSEGV"]
    assert found.pop("sleep") == ["crash: it took longer than 2 s"]
    assert found.pop(once)[0].startswith("crash_once: a process died while it looked at it: SIGKILL")
    assert found == {}


def test_workers_that_cannot_start_end_the_examination_with_their_error() -> None:
    with pytest.raises(DataError, match="the tokenizer is not there"):
        list(run_job(HopelessJob(), [["a"]], workers=1))
    with pytest.raises(DataError, match=r"die before they look at anything .*SIGKILL"):
        list(run_job(DyingJob(), [["a"]], workers=1))


# --- a whole examination ----------------------------------------------------------------------------------------------


def write_records(folder: Path, records: list[dict[str, Any]], name: str = "data.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def record(id: str, image: str | None = None, question: str = "What?", answer: str = "A tile.") -> dict[str, Any]:
    turns = [("human", f"<image>\n{question}" if image else question), ("gpt", answer)]
    made: dict[str, Any] = {"id": id, "conversations": [{"from": who, "value": text} for who, text in turns]}
    return made | ({"image": image} if image else {})


def run_over(tiny_dir: Path, out: Path, path: Path, *overrides: str) -> RunConfig:
    """A tiny run whose only stage reads ``path``."""
    data = f"stages.instruct.data=[{{path: {path}, name: mine}}]"
    return tiny_run(tiny_dir, out, "stages.align=null", data, "data.on_bad_sample=quarantine", *overrides)


def examined(run: RunConfig, **options: Any) -> Diagnosis:
    out = Path(run.output_dir) / "doctor"
    stages = options.pop("stages", list(run.stages))
    return examine(run, model_spec(run.model), stages=stages, out=out, workers=1, progress=False, **options)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Ten records over two sound images and a broken one; records 1, 4 and 6 are bad, 8 only shares an id."""
    folder = tmp_path / "data"
    rows = [
        record("r0", "a.png"),
        record("r1", "broken.png", question=f"Who? {EVIL}"),
        record("r2", "b.jpg"),
        record("r3"),
        record("r4", "gone.png"),
        record("r5", "a.png"),
        record("r5", "a.png"),
        record("r7", "b.jpg"),
        record("r7", "a.png", question="Another?"),
        record("r9"),
    ]
    path = write_records(folder, rows)
    (folder / "a.png").write_bytes(encoded("PNG"))
    (folder / "b.jpg").write_bytes(encoded("PNG"))
    (folder / "broken.png").write_bytes(encoded("PNG")[:200])
    return path


def test_manifest_and_summary_list_what_is_bad(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small)
    diagnosis = examined(run)
    folder = tmp_path / "out" / "doctor"
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [(e["record"], e["id"], e["check"]) for e in entries] == [
        (1, "r1", "image_damaged"),
        (4, "r4", "image_missing"),
        (6, "r5", "duplicate"),
    ]
    assert entries[2]["reason"] == "the same id and content as record 5"
    assert {(e["source"], e["file"], tuple(e["stages"])) for e in entries} == {("mine", str(small), ("instruct",))}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["records"] == 10
    assert summary["bad_records"] == 3
    assert summary["images"] == 4  # distinct ones, each looked at once
    assert {check: found["records"] for check, found in summary["checks"].items()} == {
        "image_missing": 1,
        "image_damaged": 1,
        "duplicate": 1,
        "same_id": 1,
        "image_extension": 2,
    }
    assert summary["checks"]["image_extension"] == {"severity": "note", "records": 2, "images": 1}
    assert diagnosis.has_errors
    assert not list(folder.glob("*.tmp"))


def test_an_image_of_two_datasets_and_a_dataset_of_two_stages_are_examined_once(
    tiny_dir: Path, tmp_path: Path, small: Path
) -> None:
    held = write_records(small.parent, [record("v0", "a.png"), record("v1", "gone.png")], "held.json")
    source = f"[{{path: {small}, name: mine}}]"
    run = tiny_run(
        tiny_dir,
        tmp_path / "out",
        f"stages.align.data={source}",
        f"stages.instruct.data={source}",
        f"stages.instruct.validation.data=[{{path: {held}, name: held}}]",
    )
    diagnosis = examined(run)
    assert diagnosis.summary["images"] == 4
    assert [(source.source, source.stages, source.bad_records) for source in diagnosis.tally.sources] == [
        ("mine", ["align", "instruct"], 3),
        ("held", [use_of("instruct", validation=True)], 1),
    ]
    assert diagnosis.tally.images["image_missing"] == 1
    assert diagnosis.tally.records["image_missing"] == 2
    only = examined(run, stages=["align"])
    assert [(source.source, source.stages) for source in only.tally.sources] == [("mine", ["align"])]


def test_a_record_that_kills_or_stops_its_worker_is_found_and_the_others_are_examined(
    tiny_dir: Path, tmp_path: Path
) -> None:
    rows = [record(f"r{n}", question={5: "KILL", 9: "SLEEP"}.get(n, "What?")) for n in range(14)]
    rows.append(record("r13"))
    path = write_records(tmp_path / "data", rows)
    run = run_over(tiny_dir, tmp_path / "out", path, "data.template=dangerous")
    diagnosis = examined(run, stuck_after_s=2)
    lines = [json.loads(line) for line in (tmp_path / "out/doctor/manifest.jsonl").read_text().splitlines()]
    assert [(line["record"], line["check"]) for line in lines] == [(5, "crash"), (9, "crash"), (14, "duplicate")]
    assert "SIGKILL" in lines[0]["reason"]
    assert "longer than 2 s" in lines[1]["reason"]
    assert diagnosis.summary["records"] == 15


def test_datasets_that_cannot_be_examined_are_all_named(tiny_dir: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps([record("a")])[:-1])
    lost = write_records(tmp_path, [record("a", "a.png")], "lost.json")
    sound = write_records(tmp_path, [record("a")], "sound.json")
    sources = f"[{{path: {cut}}}, {{path: {lost}, images: {tmp_path / 'nowhere'}}}, {{path: {sound}}}]"
    run = tiny_run(tiny_dir, tmp_path / "out", "stages.align=null", f"stages.instruct.data={sources}")
    diagnosis = examined(run)
    assert [failed.name for failed in diagnosis.unreadable] == ["cut", "lost"]
    assert "the array is not closed" in diagnosis.unreadable[0].reason
    assert "image folder" in diagnosis.unreadable[1].reason
    assert [source.source for source in diagnosis.tally.sources] == ["sound"]
    assert diagnosis.has_errors
    document = parse(build_page(diagnosis, title="t"))
    assert "the array is not closed" in document.by_id("unreadable").text


def test_the_page_shows_counts_examples_and_fixes(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    rows = json.loads(small.read_text()) + [record(f"m{n}", f"none{n}.png") for n in range(20)]
    rows.append({"id": "x", "conversations": [{"from": "gpt", "value": "A reader's words."}]})
    small.write_text(json.dumps(rows))
    diagnosis = examined(run_over(tiny_dir, tmp_path / "out", small))
    html = build_page(diagnosis, title="my run")
    document = parse(html)
    assert_self_contained(document)
    assert EVIL not in html
    counts = {row[0]: row[1:] for row in document.by_id("checks").rows()}
    assert counts["image missing"] == ["✗ error", "21", "21"]
    assert counts["extension of another format"] == ["note", "2", "1"]
    assert [row[2:4] for row in document.by_id("sources").rows()] == [["31", "24"]]
    missing = document.by_id("check-image_missing")
    assert len(missing.all("article")) == 12
    assert "and 9 more" in missing.text
    assert CHECKS["image_missing"].fix in missing.text
    assert not missing.all("img")
    damaged = document.by_id("check-image_damaged").all("article")[0]
    assert 'data.json#1 (id "r1")' in damaged.text
    assert EVIL in damaged.text  # as text
    duplicate = document.by_id("check-duplicate").all("article")[0]
    (picture,) = duplicate.all("img")
    assert (picture.attributes["src"] or "").startswith("data:image/")
    assert "user: <image> What?" in duplicate.text
    refused = document.by_id("check-turns").all("article")[0]
    assert "A reader's words." in refused.text  # a refused record is shown as it stands in the file
    console = Console(width=140, file=io.StringIO())
    console.print(findings_table(diagnosis))
    assert "24 of 31 records are bad" in console.file.getvalue()


def test_the_command_finds_exactly_what_was_planted(tmp_path: Path) -> None:
    world = World(tmp_path, records=3000, images=150, faults=104)
    planted = world.write()
    config = write_config(tmp_path)
    assert len(planted.faults) == 104
    assert len(set(planted.faults.values())) == 14
    assert main(["doctor", "--config", str(config), "--workers", "2"]) == 1
    assert differences(planted, read_manifest(tmp_path)) == []
    summary = json.loads((tmp_path / "run/doctor/summary.json").read_text())
    assert summary["checks"]["same_id"]["records"] == planted.notes["same_id"] > 0
    assert parse((tmp_path / "run/doctor/doctor.html").read_text()).by_id("checks").rows()


def test_a_sound_dataset_gives_exit_code_0_and_an_empty_manifest(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert main(["doctor", "--config", str(config), "--images", "header", "--out", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found" / "manifest.jsonl").read_text() == ""
    assert not (tmp_path / "out" / "doctor").exists()
    assert main(["doctor", "--config", str(config), "--stage", "absent"]) == 2


def test_an_interrupt_ends_it_cleanly(tiny_dir: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "data", [record(f"r{n}", question="SLEEP") for n in range(4)])
    run = run_over(tiny_dir, tmp_path / "out", path, "data.template=dangerous")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json") | {"plugins": ["tests.doctor_templates"]}))
    command = [sys.executable, "-m", "vlit.cli", "doctor", "--config", str(config), "--workers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    watched, until = psutil.Process(process.pid), time.monotonic() + 60
    while time.monotonic() < until and not any(
        worker.num_fds() and worker.ppid() != process.pid for worker in watched.children(recursive=True)
    ):
        time.sleep(0.05)
    time.sleep(1.0)
    workers = watched.children(recursive=True)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    psutil.wait_procs(workers, timeout=10)
    assert [worker for worker in workers if worker.is_running()] == []
    assert list((tmp_path / "out" / "doctor").iterdir()) == []


# --- training honours it ----------------------------------------------------------------------------------------------


def test_training_leaves_out_what_the_manifest_lists(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small, "data.quarantine_budget=0.5")
    before = open_mixture(run, "instruct", progress=False)
    examined(run)
    assert manifest_of(run) == tmp_path / "out" / "doctor" / "manifest.jsonl"
    after = open_mixture(run, "instruct", progress=False)
    source = after.sources[0]
    assert [source.place(n).split(" ")[0] for n in range(len(source))] == [
        f"data.json#{n}" for n in (0, 2, 3, 5, 7, 8, 9)
    ]
    assert source.num_quarantined == 3
    listed = [json.loads(line) for line in (tmp_path / "out/instruct/quarantine.jsonl").read_text().splitlines()]
    assert [(line["record"], line["found"]) for line in listed] == [(1, "doctor"), (4, "doctor"), (6, "doctor")]
    identities = [stage_identity(run, "instruct", mixture, "", None, None) for mixture in (before, after)]
    assert identities[0]["sources"] != identities[1]["sources"]
    again = open_mixture(run, "instruct", progress=False)
    assert again.sources[0].content_hash == source.content_hash
    assert len((tmp_path / "out/instruct/quarantine.jsonl").read_text().splitlines()) == 3
    (tmp_path / "out/doctor/manifest.jsonl").unlink()
    without = open_mixture(run, "instruct", progress=False)
    assert without.sources[0].content_hash == before.sources[0].content_hash
    assert (tmp_path / "out/instruct/quarantine.jsonl").read_text() == ""


def opened(
    run: RunConfig, manifest: Path | None, stage: str = "instruct", *, most: int | None = None, **data: Any
) -> Any:
    """The run's dataset, opened under other data rules."""
    source = run.stages["instruct"].data[0].model_copy(update={"max_records": most})
    rules = run.data_for("instruct").model_copy(update=data)
    return open_source(source, data=rules, seed=0, progress=False, manifest=manifest, stage=stage)


def test_the_manifest_is_a_policy_with_a_budget(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small)
    examined(run)
    manifest = manifest_of(run)
    with pytest.raises(DataError, match=r"mine: 3 of 10 records are quarantined \(30.00%\), more than .* 1.00%"):
        opened(run, manifest)
    assert len(opened(run, manifest, stage="align")) == 10  # another stage's data, other rules
    source = opened(run, manifest, quarantine_budget=0.3)
    assert len(source) == 7
    drawn = opened(run, manifest, most=6, quarantine_budget=0.3)
    assert len(drawn) == 6  # drawn from the good ones
    assert {drawn.place(n) for n in range(6)} < {source.place(n) for n in range(7)}
    with pytest.raises(DataError, match=r'data.json: 3 records are bad.*vlit doctor.*\n  data.json#1 \(id "r1"\)'):
        opened(run, manifest, on_bad_sample="error")


def test_a_manifest_of_another_content_is_refused(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small, "data.quarantine_budget=0.5")
    examined(run)
    rows = json.loads(small.read_text())
    small.write_text(json.dumps(rows[::-1]))
    with pytest.raises(DataError, match=r"lists bad records of mine .* Run vlit doctor again, or delete the manifest"):
        opened(run, manifest_of(run))
    examined(run)
    assert len(opened(run, manifest_of(run))) == 7
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"record": 1}\n')
    with pytest.raises(DataError, match=r"broken.jsonl:1: not a line of a manifest"):
        opened(run, broken)


def test_a_manifest_can_be_named_and_must_then_exist(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    run = run_over(tiny_dir, tmp_path / "out", small, f"data.manifest={elsewhere}")
    with pytest.raises(DataError, match=r"elsewhere.jsonl does not exist. Run vlit doctor"):
        manifest_of(run)
    elsewhere.touch()
    assert manifest_of(run) == elsewhere
