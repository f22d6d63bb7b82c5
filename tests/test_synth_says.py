"""What `vlit synth` says when a run makes nothing, an endpoint is not there, or the command line is mistaken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.spoilt_pictures import bare_pictures
from tests.teacher_server import running
from vlit.cli import main
from vlit.synth.engine.prompts import FOLDER, read_prompt

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ("--teacher", "openai", "teacher.base_url=http://127.0.0.1:9/v1", "teacher.model=m", "teacher.retries=0")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three bare pictures."""
    return bare_pictures(tmp_path / "pictures", 3)


def test_an_endpoint_that_is_not_there_is_the_reason_that_is_given(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["synth", "run", "--recipe", "minigpt4", "--images", str(pictures), "--out", str(out), *TEACHER, "--yes"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "not complete: 3 requests unanswered, most often: no answer after 1 attempt: " in said
    assert "refused" in said.split("most often:")[1]
    (stage, *_) = json.loads((out / "report.json").read_text())["stages"]
    assert sum(stage["unanswered_because"].values()) == 3


def test_a_run_that_made_no_record_is_no_success_and_says_where_all_was_lost(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["synth", "run", "--recipe", "minigpt4", "--images", str(pictures), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "no record was made; stage caption left out all of its 3 items, most often because refused" in said
    assert "The embedded teacher answers from annotations: give --annotations" in said


def test_settings_stand_on_both_sides_of_an_option(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["synth", "run", "--recipe", "minigpt4", "max_items=2", "--images", str(pictures), "--out", str(tmp_path / "a"),
             *TEACHER, "--yes", "seed=3"]  # fmt: skip
    assert main(words) == 1
    assert json.loads((tmp_path / "a" / "run.json").read_text()) | {"max_items": 2, "seed": 3} == json.loads(
        (tmp_path / "a" / "run.json").read_text()
    )
    for wrong in ("--colour=red", "stray"):
        with pytest.raises(SystemExit):
            main([*words, "--yes", wrong])
        assert capsys.readouterr().err.endswith(f"unrecognized arguments: {wrong}\n")


def test_a_folder_without_prompts_and_a_folder_that_is_not_there_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["synth", "run", "--recipe", "minigpt4", "--images", str(pictures), "--out", str(tmp_path / "run")]
    for folder, said in (
        (tmp_path / "none", "is no folder"),
        (pictures, "none of its files takes the place of a prompt"),
    ):
        assert main([*words, f"recipe.prompts={folder}"]) == 2
        assert said in capsys.readouterr().err
    own = tmp_path / "own" / "minigpt4"
    own.mkdir(parents=True)
    (own / "captoin.v1.txt").write_text("=== user\nWhat is this?\n")
    assert main([*words, f"recipe.prompts={own.parent}"]) == 2
    assert "it holds minigpt4/captoin" in capsys.readouterr().err
    name = next((FOLDER / "minigpt4").glob("*.v*.txt")).name
    (own / name).write_text((FOLDER / "minigpt4" / name).read_text())
    assert main([*words, f"recipe.prompts={own.parent}"]) == 2
    assert "no record was made" in capsys.readouterr().err  # as with vlit's own prompts


def test_a_file_in_place_of_the_runs_folder_and_the_folder_of_a_build_are_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["synth", "run", "--recipe", "minigpt4", "--images", str(pictures), "--out", str(tmp_path / "file")]
    assert main(words) == 2
    assert f"out: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    (tmp_path / "build" / "llava").mkdir(parents=True)
    (tmp_path / "build" / "llava" / "run.json").write_text("{}")
    assert main(["synth", "status", str(tmp_path / "build")]) == 2
    assert f"This is a build of several; give one of {tmp_path / 'build' / 'llava'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "name", "text", "said"),
    [
        (
            "minigpt4",
            "minigpt4/refine",
            b"=== user\nIt costs $5. Mend: $text",
            '"$5." is no placeholder here. Known: text.',
        ),
        (
            "minigpt4",
            "minigpt4/continue",
            b"=== system\n$txt\n=== user\n$text",
            'Known: text. Did you mean "text"? Write $$',
        ),
        ("minigpt4", "minigpt4/caption", b"=== user\nDescribe ${it}.", '"${it}." is no placeholder here. It has none.'),
        ("minigpt4", "minigpt4/refine", "=== user\nD\u00e9cris $text".encode("latin-1"), "byte 10 is not UTF-8"),
        ("minigpt4", "minigpt4/instructions", b"\xff\xfeD", "byte 0 is not UTF-8"),
        ("llava", "llava/detail", b"=== user\n$captons and $boxes", 'Known: boxes, captions. Did you mean "captions"?'),
        ("adapt", "adapt/count", b"How many $names?\n" * 5, '"$names?" is no placeholder here. Known: name.'),
    ],
)
@pytest.mark.parametrize("command", ["run", "estimate"])
def test_a_prompt_of_ones_own_that_cannot_be_filled_is_named_before_anything_is_asked(
    recipe: str, name: str, text: bytes, said: str, command: str, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "own" / f"{name}.v9.txt"
    file.parent.mkdir(parents=True)
    file.write_bytes(text)
    rows = {"images": [{"id": 0, "file_name": "0.png", "width": 24, "height": 24}], "categories": [], "annotations": []}
    (tmp_path / "instances.json").write_text(json.dumps(rows))
    words = ["synth", command, "--recipe", recipe, "--images", str(pictures), "--out", str(tmp_path / "run"), *TEACHER]
    more = ["--annotations", str(tmp_path / "instances.json"), f"recipe.prompts={tmp_path / 'own'}"]
    assert main([*words, *more, *(["--yes"] if command == "run" else [])]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {file}: ")
    assert said in error
    assert not (tmp_path / "run" / "calls.jsonl").is_file() or not (tmp_path / "run" / "calls.jsonl").read_bytes()


def test_a_prompt_may_hold_dollar_signs_and_a_mark_of_byte_order(tmp_path: Path) -> None:
    own = tmp_path / "minigpt4"
    own.mkdir()
    (own / "refine.v9.txt").write_bytes(
        b"\xef\xbb\xbf=== system\nIt costs $$5.\n=== user\nFrom $5\n=== assistant\n$6\n=== user\n$text"
    )
    said = read_prompt("minigpt4/refine", own=str(tmp_path)).messages(text="7 $")
    assert [message.text for message in said] == ["It costs $5.", "From $5", "$6", "7 $"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run --recipe minigpt4 --images {folder} --out {folder}/o --teacher openai --yes teacher.model=m "
         "teacher.base_url=http://[::1/v1", "teacher.base_url: no address (Invalid IPv6 URL)"),
        ("estimate --recipe minigpt4 --images {folder} --out {folder}/o --teacher openai teacher.model=m "
         "teacher.base_url=http://127.0.0.1:port/v1", "teacher.base_url: no address (Port could not be cast"),
        ("run --recipe minigpt4 --images {folder} --out {folder}/o --teacher openai --yes teacher.model=m "
         "teacher.base_url=http://127.0.0.1:99999/v1", "teacher.base_url: no address (Port"),
        ("run --recipe minigpt4 --images {folder} --out {file}/o", "out: {file}/o cannot be made (Not a directory)"),
        ("world --out {file}", "world {file}: this is a file. Choose a folder."),
        ("world --out {file}/w", "world {file}/w: its folder cannot be made (File exists)"),
    ],
)  # fmt: skip
def test_an_address_or_a_place_that_cannot_be_is_one_line(
    command: str, said: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    names = {"folder": str(pictures), "file": str(tmp_path / "file")}
    assert main(["synth", *(word.format(**names) for word in command.split())]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said.format(**names)}")
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_an_endpoint_told_to_wait_an_hour_ends_at_once_by_ctrl_c(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running() as server:
        server.fixed = (429, b'{"error": {"message": "slow"}}', {"Retry-After": "3600"})
        teacher = ["--teacher", "openai", f"teacher.base_url={server.url}", "teacher.model=m", "teacher.concurrency=2"]
        words = [
            "synth",
            "run",
            "--recipe",
            "minigpt4",
            "--images",
            str(pictures),
            "--out",
            str(out),
            *teacher,
            "--yes",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(
            [sys.executable, "-m", "vlit.cli", *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        while server.accounts.requests < 1 and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        try:
            _, said = child.communicate(timeout=20)
        finally:
            child.kill()
    assert time.monotonic() - started < 10
    assert child.returncode == 130, said[-2000:]
    assert json.loads((out / "report.json").read_text())["records"] is None
