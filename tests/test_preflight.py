"""What differs between the processes of a run is found before weights are loaded, and every process is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.ranks import PROGRAMS, ROOT, by_hand, environment, launched
from tests.tiny_run import tiny_run
from vlit.errors import TrainingError
from vlit.train.cluster.comparison import ranks_text, size
from vlit.train.cluster.preflight import data_identities, preflight
from vlit.train.distributed import Ranks

CHECK = str(PROGRAMS / "check.py")
HOST = os.uname().nodename
ALONE = Ranks(state=None, device=torch.device("cpu"), rank=0, world_size=1)
CASES = {
    "fine": ["preflight: 2 ranks on 1 host, gloo, all_reduce ", " GB/s, disk ", " GB free, "],
    "local_config": ["preflight: 2 ranks on 1 host"],
    "config": [
        "TrainingError: preflight: the configuration differs",
        "stages.align.lr: 0.002 on rank 0, 0.5 on rank 1",
        "the same file and overrides",
    ],
    "version": ["transformers differs: 5.", f" on rank 0 (host {HOST}); 4.1.0 on rank 1 (host {HOST}). Install the same"],
    "data": ["content of dataset align/colours differs: ", f"; 0123456789 on rank 1 (host {HOST}). Copy the same file"],
    "precision": ["precision differs: float32 on rank 0", "bfloat16 on rank 1", "Set runtime.precision"],
    "two": [
        "TrainingError: preflight found 2 problems: (1) rank 1 (host",
        "mix665k.json: no such file.",
        "(2) content of dataset align/colours differs",
    ],
    "disk": ["the checkpoints and the model need 1000000.0 TB (1000000000000000000 bytes), ", " are free. Free space"],
    "memory": ["preflight: 2 ranks", "a process needs about 1000.0 TB of memory", "runtime.strategy zero2"],
    "shm": [
        "/dev/shm on host node17: 8 data workers hand over up to 1.1 GB through it, 67.1 MB are free.",
        "Set data.num_workers=0",
        "--shm-size=2g",
    ],
    "clock": ["preflight: 2 ranks", f"the clock of rank 1 (host {HOST}) is 500 s ahead of that of rank 0"],
    "folder": ["is not the folder that rank 0 on host", "shared file system"],
    "crash": [f"rank 1 (host {HOST}): facts cannot be gathered: ZeroDivisionError"],
    "wrong": ["collectives give wrong answers: all_gather gave rank 0 a wrong answer from rank 1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    path = folder / "run.yaml"
    run = tiny_run(tiny_dir, folder / "out")
    path.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def told(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What both ranks were told in every case; one pair of processes goes through all of them."""
    folder = tmp_path_factory.mktemp("told")
    with launched(folder, CHECK, str(config), str(folder), *CASES) as run:
        codes, stderr = run.wait(limit_s=120)
        assert codes == [0], stderr[-3000:]
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_named_with_both_values_and_the_fix(case: str, told: list[dict[str, str]]) -> None:
    position = -1
    for expected in CASES[case]:
        found = told[0][case].find(expected)
        assert found > position, told[0][case]
        position = found
    if told[0][case].startswith("TrainingError"):
        assert told[1][case].startswith("TrainingError")
    else:
        assert told[1][case].split(" free, ")[0] == told[0][case].split(" free, ")[0]


def test_what_may_differ_between_machines_is_no_problem(told: list[dict[str, str]]) -> None:
    assert not told[0]["local_config"].startswith("TrainingError")
    assert len(told[0]) == len(CASES) >= 14


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("late", "rank 1 did not arrive. Look at its log"),
        ("stuck", "rank 1 (host {host}) stopped answering during the test of the collectives (pid {pid})"),
    ],
)
def test_a_rank_that_does_not_come_is_named_within_the_limit(
    case: str, expected: str, config: Path, tmp_path: Path
) -> None:
    with by_hand(tmp_path, CHECK, str(config), str(tmp_path), case) as run:
        started = time.monotonic()
        run.processes[0].wait(timeout=90)
        assert time.monotonic() - started < 80
        answer = json.loads((tmp_path / "told-0.json").read_text())[case]
        assert expected.format(host=HOST, pid=run.pid(1)) in answer


def test_one_process_is_checked_in_a_blink(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    identities, problems = data_identities(run, ALONE)
    assert set(identities) == {"align/colours", "instruct/colours"}
    report = preflight(run, ALONE, identities=identities, problems=problems)
    assert report.seconds < 2.0
    assert str(report).startswith("preflight: 1 rank on 1 host, disk ")
    assert capsys.readouterr().err.strip() == str(report)
    assert list((tmp_path / "out").iterdir()) == []  # nothing is left behind
    with pytest.raises(TrainingError, match=r"are free\. Free space, lower checkpoint\.keep"):
        preflight(run, ALONE, identities=identities, needed_bytes=10**18)


def test_a_folder_that_cannot_be_written_is_found(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainingError, match=r"output_dir .*file/out: cannot be written by user \d+ \(Not a directory\)"
    ):
        preflight(tiny_run(tiny_dir, tmp_path / "file" / "out"), ALONE, identities={})


def test_the_command_prints_a_table_and_its_exit_code_says_whether_to_start(config: Path) -> None:
    with_ranks = [sys.executable, "scripts/launch.py", "--nproc-per-node=2", "scripts/preflight.py"]
    fine = subprocess.run(
        [*with_ranks, "--config", str(config)], cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=90
    )
    assert fine.returncode == 0, fine.stderr
    assert "preflight: 2 ranks on 1 host, gloo" in fine.stderr
    assert fine.stdout.count(HOST) == 2
    words = ["--config", str(config), "stages.align.data.0.path=nowhere.json"]
    wrong = subprocess.run(
        [*with_ranks, *words], cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=90
    )
    assert wrong.returncode == 2
    assert "error: preflight: nowhere.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_ranks_and_sizes_are_written_for_people() -> None:
    def of(*numbers: int, host: str = "a") -> list[dict[str, object]]:
        return [{"rank": n, "host": host} for n in numbers]

    assert ranks_text(of(3, host="b")) == "rank 3 (host b)"
    assert ranks_text(of(*range(8))) == "ranks 0-7 (host a)"
    assert ranks_text(of(0, 1, 2) + of(9, host="b")) == "ranks 0-2, 9 (hosts a, b)"
    assert [size(n) for n in (12, 1_234, 5.6e9, 2e12)] == ["12 bytes", "1.2 kB", "5.6 GB", "2.0 TB"]
