"""The records a run leaves out: counted once over all ranks and starts, listed whole, and held against one budget."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_cases import Case, run_cases
from tests.test_train_run import interrupt_after
from tests.tiny_run import metrics_of, tiny_run, write_dataset
from vlit.data.quarantine import write_quarantine
from vlit.errors import DataError
from vlit.train.distributed import Ranks
from vlit.train.identity import open_mixture
from vlit.train.quarantine import Quarantine
from vlit.train.run import run_training
from vlit.train.signals import Interrupted
from vlit.types import QuarantineEntry

ALONE = Ranks(state=None, device=torch.device("cpu"), rank=0, world_size=1)


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    """A run of 9 steps over 24 records, a picture of which is broken in each of the first four steps that a run makes."""
    path = write_dataset(tmp_path / "data")
    given = (
        "stages.instruct=null", "stages.align.epochs=2.25", "stages.align.max_steps=9",
        f"stages.align.data=[{{path: {path}, name: mine}}]", "data.on_bad_sample=quarantine",
    )  # fmt: skip
    mixture = open_mixture(tiny_run(tmp_path / "tiny", tmp_path / "unused", *given), "align", progress=False)
    for step in range(4):
        place = next(n for _, n in mixture.step_records(step, 6) if mixture.sources[0].sample(n).images)
        (path.parent / mixture.sources[0].sample(place).images[0]).write_bytes(b"no picture")
    return given


def listed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "align" / "quarantine.jsonl").read_text().splitlines()]


def told(error: object, out: Path) -> str:
    return str(error).replace(str(out), "OUT")


def test_the_budget_of_a_resumed_run_is_that_of_a_straight_one(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tiny_run(tmp_path / "tiny", tmp_path / "straight", *words, "data.quarantine_budget=0.13")
    with pytest.raises(DataError, match=r"mine: 4 of 24 records are quarantined \(16.67%\)") as expected:
        run_training(straight)
    assert [row["quarantined"] for row in metrics_of(straight)] == [1, 1, 1]
    assert [row["step"] for row in listed(tmp_path / "straight")] == [1, 2, 3, 4]
    again = tiny_run(tmp_path / "tiny", tmp_path / "again", *words, "data.quarantine_budget=0.13")
    interrupt_after(monkeypatch, "align", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_training(again)
    for _ in range(2):  # the second start meets what the first one did after its checkpoint
        with pytest.raises(DataError) as found:
            run_training(again)
        assert told(found.value, tmp_path / "again") == told(expected.value, tmp_path / "straight")
        assert listed(tmp_path / "again") == listed(tmp_path / "straight")


@pytest.mark.slow
def test_ranks_count_together_and_raise_the_same_error(words: tuple[str, ...], tmp_path: Path) -> None:
    enough = (*words, "data.quarantine_budget=0.17", "runtime.strategy=auto")
    little = (*words, "data.quarantine_budget=0.13", "runtime.strategy=auto")
    alone = tiny_run(tmp_path / "tiny", tmp_path / "alone", *enough)
    run_training(alone)
    assert sum(row["quarantined"] for row in metrics_of(alone)) > 8, (
        "each is met twice, and counted once for the budget"
    )
    with pytest.raises(DataError) as expected:
        run_training(tiny_run(tmp_path / "tiny", tmp_path / "straight", *little))
    cases = [Case(tmp_path / "two", enough), Case(tmp_path / "ended", little, may_fail=True)]
    done = run_cases(2, cases, tmp_path / "tiny", tmp_path / "job", timeout_s=180)
    assert done.returncode == 0, done.stdout[-4000:]
    assert listed(tmp_path / "two") == listed(tmp_path / "alone")
    assert [row["quarantined"] for row in cases[0].rows()] == [row["quarantined"] for row in metrics_of(alone)]
    assert told(done.stdout, tmp_path / "ended").count(f"DataError: {told(expected.value, tmp_path / 'straight')}") == 2
    assert listed(tmp_path / "ended") == listed(tmp_path / "straight")


def entries(count: int) -> list[QuarantineEntry]:
    return [QuarantineEntry("mine", "d.json", n, f"r{n}–", f"bad {n}", "loading", n + 1) for n in range(count)]


def test_a_list_cut_at_any_byte_is_whole_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quarantine.jsonl"
    write_quarantine(path, entries(3))
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        Quarantine(path, [], 1.0, ALONE, step=3)
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
        write_quarantine(path, entries(3))
        assert path.read_bytes() == whole, cut
    assert "quarantine.jsonl: 1 of 3 lines were cut short and are dropped." in capsys.readouterr().err


def test_a_full_disk_is_an_error_at_the_start_and_keeps_lines_for_later_while_training(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list" / "quarantine.jsonl"
    write_quarantine(path, entries(2))
    whole = path.read_bytes()
    sources = open_mixture(tiny_run(tmp_path / "tiny", tmp_path / "x", *words), "align", progress=False).sources
    quarantine = Quarantine(path, sources, 1.0, ALONE, step=2)
    held = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, held[1]))
        with pytest.raises(DataError, match=r"list of bad records was not written: .*File too large"):
            write_quarantine(path, entries(4))
        quarantine.add(entries(3))
        assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, held)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "its lines are kept for later" in capsys.readouterr().err
    quarantine.add(entries(4))
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_broken_picture_of_validation_is_left_out_or_named_by_the_same_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dataset(tmp_path / "data")
    rows = json.loads(path.read_text())
    sound = [row for row in rows if row["id"] != "r1"]
    (path.parent / "sound.json").write_text(json.dumps(sound))
    (path.parent / "001_0.png").write_bytes(b"no picture")
    training = f"stages.align.data=[{{path: {path.parent / 'sound.json'}, name: mine}}]"
    held: dict[str, list[dict[str, Any]]] = {}
    for name, records in (("data", 24), ("sound", 23)):
        validation = json.dumps({"data": [{"path": str(path.parent / f"{name}.json")}], "max_records": records,
                                 "sample_generations": 3, "max_new_tokens": 2})  # fmt: skip
        words = (training, f"stages.align.validation={validation}", "stages.instruct=null", "stages.align.max_steps=1")
        run = tiny_run(tmp_path / "tiny", tmp_path / name, *words, "data.on_bad_sample=quarantine")
        run_training(run)
        held[name] = [json.loads(line) for line in (tmp_path / name / "validation.jsonl").read_text().splitlines()]
    told = 'validation data data (id "r1"): '
    assert capsys.readouterr().err.count(f"warning: {told}") == 1
    for one, other in zip(held["data"], held["sound"], strict=True):
        assert one["label_tokens"] == other["label_tokens"] > 0
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert [sample["id"] for sample in one["samples"]] == [sample["id"] for sample in other["samples"]]
    strict = tiny_run(tmp_path / "tiny", tmp_path / "strict", *words[:1], *words[2:], "data.on_bad_sample=error",
                      f"stages.align.validation={{data: [{{path: {path}}}]}}")  # fmt: skip
    with pytest.raises(DataError, match=r'validation data data \(id "r1"\): .*on_bad_sample: quarantine'):
        run_training(strict)
