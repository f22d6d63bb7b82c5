"""What `vlit synth` says when a run makes nothing, an endpoint is not there, or the command line is mistaken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.spoilt_pictures import bare_pictures
from vlit.cli import main
from vlit.synth.engine.prompts import FOLDER

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
