"""What differs between the processes of a run is found before weights are loaded, and every process is told."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from tests.ranks import PROGRAMS, ROOT, by_hand, environment, launched
from tests.tiny import needs_bitsandbytes
from tests.tiny_run import tiny_run
from vlit.cli import main
from vlit.config.load import load_config
from vlit.config.schema import OffloadConfig
from vlit.errors import TrainingError
from vlit.train.cluster.comparison import ranks_text, size
from vlit.train.cluster.facts import offload_problems, versions
from vlit.train.cluster.needs import PartCount, Sharing, Weights, room_of
from vlit.train.cluster.preflight import preflight
from vlit.train.distributed import Ranks
from vlit.train.identity import data_identities, open_data

MODULES = {"pillow": "PIL", "open_clip_torch": "open_clip"}
GIANT = 2_000_000_000
"""Inner width of a language model of 2 x 3 matrices [64, GIANT]: 3.1 TB in fp32."""
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
    "disk": [
        "CheckpointError: preflight: ",
        "/align: 1000000000000 checkpoints of 75.3 kB, one being written and the model need 75,264,000.00 GB, ",
        " GB are free. Free some space, set stages.align.checkpoint.keep lower",
    ],
    "memory": [
        f"TrainingError: preflight: host {HOST}: stage align does not fit its memory: its 2 processes need at least 3.1 TB, ",
        " are free. Train fewer weights",
    ],
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


def wide_llm(source: str, folder: Path, *, width: int) -> Path:
    """The language model of ``source`` described with another inner width: tokenizer and config.json, no weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"intermediate_size": width}))
    return folder


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
    wide_llm(load_config(str(config)).model.llm.path, folder / "giant", width=GIANT)
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
    kind = told[0][case].partition(": ")[0]
    if kind.endswith("Error"):
        assert told[1][case].startswith(f"{kind}: preflight")
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
    opened, problems = open_data(run, progress=False)
    identities = data_identities(opened)
    assert set(identities) == {"align/colours", "instruct/colours"}
    report = preflight(run, ALONE, identities=identities, problems=problems)
    assert report.seconds < 2.0
    assert str(report).startswith("preflight: 1 rank on 1 host, disk ")
    assert capsys.readouterr().err.strip() == str(report)
    assert list((tmp_path / "out").iterdir()) == []  # nothing is left behind


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


def test_a_folder_for_offloading_must_be_there_and_writable(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [sys.executable, "scripts/launch.py", "--nproc-per-node=2", "scripts/preflight.py", "--config", str(config)]
    offload = f"{{optimizer: nvme, nvme_path: {tmp_path / 'nowhere'}}}"
    done = subprocess.run(
        [*words, "runtime.strategy=zero3", f"runtime.offload={offload}"],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 2
    expected = f"error: preflight: runtime.offload.nvme_path {tmp_path / 'nowhere'}: cannot be written by user"
    assert f"{expected} {os.getuid()} (No such file or directory). Name a folder" in done.stderr
    told = {
        name: offload_problems(OffloadConfig(parameters="nvme", nvme_path=str(tmp_path / name)))
        for name in ("file", ".")
    }
    assert "(Not a directory)" in told["file"][0]
    assert told["."] == offload_problems(OffloadConfig(optimizer="cpu", nvme_path="/nowhere")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_packages_that_read_words_pictures_and_weights_are_compared() -> None:
    wanted = ("tokenizers", "pillow", "torchvision", "bitsandbytes", "timm", "open_clip_torch")
    installed = {name for name in wanted if importlib.util.find_spec(MODULES.get(name, name)) is not None}
    assert {"tokenizers", "pillow"} <= installed
    assert {name: versions().get(name) for name in installed} == {n: importlib.metadata.version(n) for n in installed}


CONNECTOR = (32 * 64 + 64) + (64 * 64 + 64)
"""Values of the two layers between an encoder of width 32 and a language model of width 64."""


def values_in(path: Path) -> int:
    """Number of values in a safetensors file, by the shapes in its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize("command", ["preflight", "train"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_stage_without_room_is_refused_before_any_stage_loads_weights(
    command: str, stage: str, config: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = 10**9
    trained = CONNECTOR + (values_in(tiny_dir / "llama" / "model.safetensors") if stage == "instruct" else 0)
    words = ["--config", str(config), f"output_dir={tmp_path / 'out'}", f"stages.{stage}.checkpoint.keep={keep}"]
    assert main([command, *words]) == 2
    error = capsys.readouterr().err
    assert f"error: preflight: {tmp_path / 'out' / stage}: {keep} checkpoints of {size(12 * trained)}, " in error
    needed = 12 * trained * (keep + 1) + 4 * trained
    earlier = f" besides {size(4 * CONNECTOR)} of the stages before it" if stage == "instruct" else ""
    assert f" need {needed / 1e9:,.2f} GB{earlier}, " in error
    assert f" GB are free. Free some space, set stages.{stage}.checkpoint.keep lower" in error
    assert "Loading weights" not in error
    assert "model loaded" not in error
    assert not (tmp_path / "out" / "align").exists()


def test_only_stages_that_will_be_trained_need_room(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--config", str(config), f"output_dir={out}"]
    large = ["stages.instruct.checkpoint.keep=1000000000"]
    assert main(["train", "--stage", "align", *words, *large, "stages.align.max_steps=1"]) == 0
    assert (out / "align" / "done.json").is_file()
    capsys.readouterr()
    assert main(["preflight", *words, "stages.align.checkpoint.keep=1000000000"]) == 0
    assert main(["preflight", *words, *large]) == 2
    error = capsys.readouterr().err
    assert "the stages before it" not in error  # align's model is on the disk already
    assert f"{out / 'instruct'}: 1000000000 checkpoints" in error


def test_the_disk_is_refused_by_one_checkpoint_and_what_an_earlier_start_left_counts_as_room(
    config: Path, tmp_path: Path
) -> None:
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    try:
        out = tmp_path / "out"
        (out / "align" / "state" / "step-2").mkdir(parents=True)
        checkpoint = 12 * CONNECTOR
        fits = (shutil.disk_usage(tmp_path).free - 4 * CONNECTOR) // checkpoint - 1
        words = ["preflight", "--config", str(config), f"output_dir={out}", "stages.instruct=null"]
        codes = [main([*words, f"stages.align.checkpoint.keep={fits + more}"]) for more in (-1, 1)]
        assert codes == [0, 2]
        (out / "align" / "state" / "step-2" / "rank-0.safetensors").write_bytes(bytes(20 * checkpoint))
        assert [main([*words, f"stages.align.checkpoint.keep={fits + more}"]) for more in (-1, 1)] == codes
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("command", ["preflight", "train"])
def test_weights_that_do_not_fit_the_memory_are_refused_before_they_are_read(
    command: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    giant = wide_llm(load_config(str(config)).model.llm.path, tmp_path / "giant", width=GIANT)
    words = ["--config", str(config), f"output_dir={tmp_path / 'out'}", f"model.llm.path={giant}"]
    assert main([command, *words, "stages.instruct=null"]) == 2
    least = 2 * 3 * 64 * GIANT * 4  # two layers of three matrices in fp32; the rest is below a thousandth
    error = capsys.readouterr().err
    assert f"host {HOST}: stage align does not fit its memory: it needs at least {size(least)}, " in error
    assert "set model.llm.quantize" in error
    assert main([command, *words]) == 2  # in instruct: weights, gradients and two optimizer states
    error = capsys.readouterr().err
    assert f"preflight found 2 problems: (1) host {HOST}: stage instruct does not fit its memory" in error
    assert f"it needs at least {size(4 * least)}, " in error
    assert f"(2) {tmp_path / 'out' / 'instruct'}: 2 checkpoints of {size(3 * least)}, " in error


@needs_bitsandbytes
def test_a_decoder_that_fits_only_when_it_is_quantised_is_refused_only_when_it_is_not(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its packed weights are an eighth of fp32 and their scales little: 0.4 of the memory; the whole ones are 3 times it."""
    width = 3 * psutil.virtual_memory().available // (2 * 3 * 64 * 4) // 64 * 64
    wide = wide_llm(load_config(str(config)).model.llm.path, tmp_path / "wide", width=width)
    lora = "stages.align.tuning={llm: {mode: lora, rank: 1, targets: [q_proj]}}"
    words = ["preflight", "--config", str(config), f"output_dir={tmp_path / 'out'}", f"model.llm.path={wide}", lora]
    codes = [main([*words, "stages.instruct=null", f"model.llm.quantize={mode}"]) for mode in ("none", "4bit")]
    error = capsys.readouterr().err
    assert codes == [2, 0], error
    assert error.count("does not fit its memory") == 1


def test_processes_hold_what_their_strategy_leaves_them() -> None:
    """10 trained and 100 frozen values in bf16, 7 packed bytes, AdamW: masters 4, moments 8 and sums of gradients 4 bytes."""
    weights = Weights(trained=10, frozen=200, packed=7, value_bytes=2, moment_bytes=8)

    def held(strategy: str, *, on_cpu: bool = True, **offload: str) -> tuple[int, int]:
        sharing = Sharing(strategy, 4, OffloadConfig.model_validate(offload), on_cpu)
        return sharing.on_device(weights), sharing.on_host(weights, 2, loads_all=False)

    assert held("ddp") == (200 + 7 + 20 + 40 + 120, 200 + 2 * (7 + 20 + 40 + 120))
    assert held("zero1") == (200 + 7 + 20 + 40 + 30, 200 + 2 * (7 + 20 + 40 + 30))
    assert held("zero2") == (200 + 7 + 20 + 10 + 30, 200 + 2 * (7 + 20 + 10 + 30))
    assert held("zero3") == (50 + 7 + 5 + 10 + 30, 2 * (50 + 7 + 5 + 10 + 30))
    assert held("zero3", optimizer="nvme", nvme_path="/x") == (50 + 7 + 5 + 10, 2 * (50 + 7 + 5 + 10))
    assert held("ddp", on_cpu=False) == (200 + 7 + 20 + 40 + 120, 7)
    assert held("zero2", on_cpu=False, optimizer="cpu") == (200 + 7 + 20, 2 * 30)
    assert held("zero3", on_cpu=False, optimizer="cpu", parameters="cpu") == (7, 2 * (30 + 50 + 5))
    on_first_host = Sharing("zero3", 4, OffloadConfig(), True).on_host(weights, 1, loads_all=True)
    assert on_first_host == 200 + 7 + 20


def test_a_model_folder_holds_adapters_or_the_whole_part_once_it_was_trained(config: Path) -> None:
    stage = load_config(str(config)).stages["align"]
    rows = [
        PartCount("vision", 1000, 0),
        PartCount("connector", 10, 10),
        PartCount("llm", 205, 5),
        PartCount("embeddings", 50, 0),
    ]
    written = {
        (): 10 + 5,
        ("connector",): 10 + 5,
        ("embeddings",): 10 + 205 + 50,
        ("vision",): 1000 + 10 + 5,
    }  # fmt: skip
    rooms = {changed: room_of("align", stage, rows, changed) for changed in written}
    assert {changed: room.written for changed, room in rooms.items()} == written
    assert {room.trained for room in rooms.values()} == {15}


def test_ranks_and_sizes_are_written_for_people() -> None:
    def of(*numbers: int, host: str = "a") -> list[dict[str, object]]:
        return [{"rank": n, "host": host} for n in numbers]

    assert ranks_text(of(3, host="b")) == "rank 3 (host b)"
    assert ranks_text(of(*range(8))) == "ranks 0-7 (host a)"
    assert ranks_text(of(0, 1, 2) + of(9, host="b")) == "ranks 0-2, 9 (hosts a, b)"
    assert [size(n) for n in (12, 1_234, 5.6e9, 2e12)] == ["12 bytes", "1.2 kB", "5.6 GB", "2.0 TB"]
