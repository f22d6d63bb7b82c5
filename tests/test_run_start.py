"""What a run makes sure of before it trains, at its first start and at every later one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_train_run import assert_same_bits, interrupt_after
from tests.tiny_run import losses_of, tiny_run
from vlit.errors import CheckpointError, DataError, TrainingError
from vlit.models.artifact import load_model
from vlit.models.assemble import VisionLanguageModel
from vlit.train import prepare
from vlit.train import run as run_module
from vlit.train.cluster.preflight import preflight
from vlit.train.cluster.watchdog import Watchdog
from vlit.train.distributed import start_ranks
from vlit.train.identity import data_identities, open_data
from vlit.train.run import run_training
from vlit.train.signals import Interrupted


def test_a_frozen_connector_that_was_replaced_on_the_disk_is_refused_when_a_stage_goes_on(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, lr in (("a", "1e-3"), ("b", "2e-3")):
        words = ("stages.instruct=null", "stages.align.max_steps=1", f"stages.align.lr={lr}")
        run_training(tiny_run(tiny_dir, tmp_path / name, *words))
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "a" / "align" / "model", start)
    tuning = "stages.instruct.tuning={connector: frozen, llm: full}"
    run = tiny_run(tiny_dir, tmp_path / "out", f"model.init_from={start}", "stages.align=null", tuning)
    interrupt_after(monkeypatch, "instruct", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_training(run)
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "b" / "align" / "model", start)
    with pytest.raises(CheckpointError, match=r"step-3 was written under another configuration: base\.connector: "):
        run_training(run)
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "a" / "align" / "model", start)
    _, manifest = load_model(run_training(run), dtype=torch.float32)
    assert set(manifest["unchanged"]) == {"vision"}, "the connector is a file of the model folder"


def test_every_dataset_of_every_stage_is_opened_before_the_first_stage_is_trained(
    tiny_dir: Path, tmp_path: Path
) -> None:
    run = tiny_run(
        tiny_dir,
        tmp_path / "out",
        "stages.instruct.data=[{path: gone.json}]",
        "stages.align.validation.data=[{path: unheard.json}]",
        "stages.instruct.validation.data=[{path: unseen.json}]",
    )
    with pytest.raises(DataError, match="3 datasets cannot be used") as caught:
        run_training(run)
    assert all(f"{name}.json" in str(caught.value) for name in ("gone", "unheard", "unseen"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    opened, problems = open_data(run, progress=False)
    with pytest.raises(TrainingError, match=r"preflight found 3 problems: \(1\) unheard.json"):
        preflight(run, start_ranks(run.runtime), identities=data_identities(opened), problems=problems)


def test_one_stage_alone_needs_no_data_of_those_after_it_and_a_finished_one_none_for_validation(
    tiny_dir: Path, tmp_path: Path
) -> None:
    words = ("stages.align.max_steps=1", "stages.instruct.max_steps=1")
    run_training(tiny_run(tiny_dir, tmp_path, *words, "stages.instruct.data=[{path: gone.json}]"), only="align")
    run_training(tiny_run(tiny_dir, tmp_path, *words), only="align")  # it is finished already
    run_training(tiny_run(tiny_dir, tmp_path, *words, "stages.align.validation.data=[{path: unheard.json}]"))
    assert (tmp_path / "instruct" / "done.json").is_file()


@pytest.mark.parametrize("moment", ["open_data", "model_of_stage", "last step"])
def test_a_signal_between_steps_ends_the_run_before_another_step_and_costs_nothing(
    moment: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("stages.align.max_steps=2", "stages.instruct.max_steps=2")
    straight, run = (tiny_run(tiny_dir, tmp_path / name, *words) for name in ("straight", "out"))
    run_training(straight)
    with monkeypatch.context() as patch:
        if moment == "last step":  # the stage's model is still written
            interrupt_after(patch, "align", 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        else:
            real = getattr(run_module, moment)

            def signalled(*words: object, **named: object) -> object:
                os.kill(os.getpid(), signal.SIGUSR1)
                return real(*words, **named)

            patch.setattr(run_module, moment, signalled)
        with pytest.raises(Interrupted) as stopped:
            run_training(run)
    assert stopped.value.exit_code == 138
    trained = losses_of(run) if (tmp_path / "out" / "metrics.jsonl").exists() else []
    assert [(stage, step) for stage, step, _ in trained] == (
        [("align", 1), ("align", 2)] if moment == "last step" else []
    )
    run_training(run)
    assert_same_bits(tmp_path / "straight" / "instruct" / "model", tmp_path / "out" / "instruct" / "model")


def test_a_refused_start_leaves_every_file_of_the_run_as_it_was(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ("stages.align.max_steps=1",)
    run = tiny_run(tiny_dir, out, *words)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "instruct", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            run_training(run)

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = files()
    assert {"config.yaml", "data_plan.json", "parts.json", "instruct/state/step-2/state.json"} <= before.keys()
    for other, difference in (
        ("stages.align.lr=0.5", r"done\.json was written under another configuration: stage\.lr"),
        ("stages.instruct.lr=0.5", r"step-2 was written under another configuration: stage\.lr"),
    ):
        with pytest.raises(CheckpointError, match=difference):
            run_training(tiny_run(tiny_dir, out, *words, other))
        assert files() == before
    monkeypatch.setattr(prepare, "fingerprints", lambda model: {"connector": "another"})
    with pytest.raises(CheckpointError, match=r"step-2 was written under another configuration: base\.connector"):
        run_training(tiny_run(tiny_dir, out, *words, "data.check_samples=9"))
    assert files() == before


def test_a_table_cut_short_is_begun_anew(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("data_plan.json", "parts.json"):
        (tmp_path / name).write_text('{"align": {"rows": [')
    run_training(tiny_run(tiny_dir, tmp_path, "stages.align.max_steps=1", "stages.instruct=null"))
    assert capsys.readouterr().err.count("it is begun anew") == 2
    assert [list(json.loads((tmp_path / name).read_text())) for name in ("data_plan.json", "parts.json")] == [
        ["align"]
    ] * 2


@pytest.mark.parametrize("compiles", [True, False])
def test_every_phase_of_a_first_step_that_compiles_may_take_its_time(
    compiles: bool, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[tuple[str, int], float] = {}
    real = Watchdog.phase

    def noted(self: Watchdog, name: str, *words: int, **named: Any) -> None:
        real(self, name, *words, **named)
        limits[name, self._phase.step] = self._phase.limit_s

    monkeypatch.setattr(Watchdog, "phase", noted)
    monkeypatch.setattr(VisionLanguageModel, "compile_blocks", lambda self: None)
    words = ("stages.instruct=null", "stages.align.max_steps=2", f"runtime.compile={str(compiles).lower()}")
    run_training(tiny_run(tiny_dir, tmp_path, *words, "runtime.hang_timeout_s=60"))
    of_a_step = ("count", "forward", "backward", "reduce", "update")
    assert [limits[name, 1] for name in of_a_step] == [3600.0 if compiles else 60.0] * 5
    assert [limits[name, 2] for name in (*of_a_step, "data")] == [60.0] * 6
    assert limits["data", 1] == 3600.0
