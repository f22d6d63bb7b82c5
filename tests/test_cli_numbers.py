"""Numbers that people type and read.

What makes no sense on the command line is refused by name, in one line, before anything is read. The memory table of
docs/scaling.md is what docs/measurements/memory_cpu.json holds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_run import tiny_run
from vlit.cli import build_parser, main, parse
from vlit.data.content_hash import content_hash_of
from vlit.errors import DataError
from vlit.plan import report

ROOT = Path(__file__).resolve().parent.parent
PLAN = ("plan", "--config", "absent.yaml")
EVAL = ("eval", "--checkpoint", "absent", "--benchmark", "digits")
CHAT = ("chat", "--checkpoint", "absent")
DOCTOR = ("doctor", "--config", "absent.yaml")
CHECKED_LATER = {"--share", "--join"}
"""Options whose bounds the command itself knows and explains."""


@pytest.fixture
def config(tiny_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tiny_dir, tmp_path / "out").model_dump(mode="json")), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("command", "option", "text", "bound"),
    [
        (PLAN, "--records", "0", "a whole number of 1 or more"),
        (PLAN, "--records", "-5", "a whole number of 1 or more"),
        (PLAN, "--records", "1.5", "a whole number of 1 or more"),
        (PLAN, "--records", "many", "a whole number of 1 or more"),
        (PLAN, "--tokens-per-record", "0", "a number of 1 or more"),
        (PLAN, "--tokens-per-record", "inf", "a number of 1 or more"),
        (PLAN, "--images-per-record", "-1", "a number of 0 or more"),
        (PLAN, "--images-per-record", "nan", "a number of 0 or more"),
        (EVAL, "--batch-size", "0", "a whole number of 1 or more"),
        (EVAL, "--max-new-tokens", "-1", "a whole number of 1 or more"),
        (CHAT, "--max-new-tokens", "0", "a whole number of 1 or more"),
        (CHAT, "--temperature", "-0.5", "a number of 0 or more"),
        (("preview", "--config", "absent.yaml"), "--samples", "0", "a whole number of 1 or more"),
        (DOCTOR, "--workers", "0", "a whole number of 1 or more"),
        (("convert", "a", "b", "--from", "llava"), "--quarantine-budget", "-0.1", "a number of 0 or more"),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_its_option_and_bound(
    command: tuple[str, ...], option: str, text: str, bound: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, option, text])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f'argument {option}: "{text}" is not {bound}')


def number_options() -> Iterator[argparse.Action]:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        yield from (action for action in command._actions if name != "synth")


def test_every_number_of_a_command_has_a_bound() -> None:
    options = list(number_options())
    assert len(options) > 50
    assert {option.option_strings[-1] for option in options if option.type in (int, float)} == CHECKED_LATER


def test_numbers_within_bounds_keep_their_type() -> None:
    args = parse([*PLAN, "--records", "1", "--tokens-per-record", "1", "--images-per-record", "0"])
    assert (args.records, args.tokens_per_record, args.images_per_record) == (1, 1.0, 0.0)
    assert isinstance(args.records, int)
    assert isinstance(args.images_per_record, float)
    assert parse([*EVAL, "--batch-size", "1"]).batch_size == 1
    assert parse([*CHAT, "--temperature", "0"]).temperature == 0.0


def test_numbers_given_are_the_numbers_planned(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--records", "7", "--tokens-per-record", "60", "--images-per-record", "0")
    assert main(["plan", "--config", str(config), "--gpus", "1xH100", "--stage", "instruct", "--json", *numbers]) == 0
    data = json.loads(capsys.readouterr().out)["stages"]["instruct"]["data"]
    assert (data["records"], data["tokens_per_record"], data["images_per_record"]) == (7, 60, 0)


def test_a_folder_of_parts_that_is_not_there_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = config.parent / "nope"
    assert main(["plan", "--config", str(config), "--gpus", "1xH100", "--parts", str(missing)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --parts {missing}: no such folder.")


def test_a_folder_that_doctor_cannot_write_is_an_error_and_not_a_finding(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 would say that records are bad."""
    out = config / "doctor"  # below a file
    assert main(["doctor", "--config", str(config), "--images", "header", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"error: doctor, which writes to {out}: " in message
    assert "--out" in message
    assert "Traceback" not in message


def measured_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        (ROOT / "docs" / "measurements" / "memory_cpu.json").read_text(encoding="utf-8")
    )["rows"]
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "seed=99999999999999999999999"), "seed: Input should be less than or equal to 9223372036854775807"),
        (("train", "runtime.num_threads=100000"), "runtime.num_threads: Input should be less than or equal to 4096"),
        (("train", "stages.align.validation.data.0.path=x"), 'the list is empty, it has no item "0"'),
        (("preview", "--out", "."), "--out .: is a folder. Name the file to write"),
    ],
)
def test_one_wrong_value_is_one_line(
    words: tuple[str, ...], expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], "--config", str(config), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_what_is_no_folder_of_a_run_or_no_file_of_data_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (config, tmp_path / "nowhere"):
        assert main(["report", str(path)]) == 2
        assert f"{path}: is no folder. Give the output_dir of a run." in capsys.readouterr().err
    os.mkfifo(tmp_path / "data.json")
    with pytest.raises(DataError, match=r"data\.json: is no regular file"):
        content_hash_of(tmp_path / "data.json", [tmp_path / "data.json"], tmp_path, progress=False)


def test_the_memory_table_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    head = "| case | dtype | predicted MiB | measured MiB | ratio | kept MiB |\n"
    table = page.partition(head)[2].split("\n\n")[0].splitlines()[1:]
    assert [line.strip("| ").split(" | ") for line in table] == [
        [row["case"], row["dtype"], f"{row['predicted_mb']:,.0f}", f"{row['measured_mb']:,.0f}", f"{row['ratio']:.3f}",
         f"{row['kept_mb']:,.0f}"] for row in measured_rows()
    ]  # fmt: skip


def test_the_sentences_around_the_memory_table_hold_its_ranges() -> None:
    page, rows = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), measured_rows()
    grown = [row["kept_mb"] / row["measured_mb"] for row in rows]
    times = f"{min(grown):.1f} to {max(grown):.1f} times"
    assert f"these runs grew {times} as large" in page
    assert times in inspect.getsource(report)
    below = [100 * (1 - row["ratio"]) for row in rows]
    assert f"Predictions are {min(below):.1f} to {max(below):.0f} % below" in page
    assert min(rows, key=lambda row: row["measured_mb"]) is min(rows, key=lambda row: row["ratio"])
