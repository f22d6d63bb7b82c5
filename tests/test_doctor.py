"""`vlit doctor` over whole datasets: manifest, page, command, and training that honours it."""

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

import psutil
import pytest
import yaml
from rich.console import Console

import tests.doctor_templates  # noqa: F401  (registers a template)
from tests.html_tools import assert_self_contained, parse
from tests.scale.doctor_665k import World, differences, read_manifest, write_config
from tests.test_doctor_images import encoded
from tests.tiny_run import tiny_run
from vlit.cli import main
from vlit.config.schema import RunConfig
from vlit.data.doctor.checks import CHECKS
from vlit.data.doctor.manifest import use_of
from vlit.data.doctor.scan import Diagnosis, examine
from vlit.models.assemble import model_spec
from vlit.serve.doctor_page import build_page, findings_table

ROOT = Path(__file__).resolve().parent.parent
EVIL = '<img src=x onerror="alert(1)">'


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
