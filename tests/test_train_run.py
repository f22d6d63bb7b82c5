"""The training loop as users rely on it: equal however it is cut into micro-batches, interrupted or resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import losses_of, metrics_of, tiny_run
from vlit.errors import CheckpointError, DataError, ModelError, TrainingError
from vlit.models.artifact import load_model
from vlit.train import stage as stage_module
from vlit.train.replicated import ReplicatedEngine
from vlit.train.run import model_folder, run_training
from vlit.train.signals import Interrupted

GOLDEN = Path(__file__).parent / "golden" / "two_stage_losses.json"


@pytest.fixture(scope="module")
def straight(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an uninterrupted run; read only."""
    out = tmp_path_factory.mktemp("straight")
    run_training(tiny_run(tiny_dir, out))
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{f.relative_to(folder)}:{n}": t for f in files for n, t in load_file(f).items()}


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    assert [n for n in left if not torch.equal(left[n], right[n])] == []


def interrupt_after(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, action: Callable[[], None]) -> None:
    """Do ``action`` once, while ``step`` of ``stage`` is being trained."""
    real, fired = stage_module.train_step, []

    def wrapped(engine, batch, **kwargs):
        name = "align" if "llm" not in engine.peak_lr else "instruct"
        result = real(engine, batch, **kwargs)
        if not fired and (name, batch.step + 1) == (stage, step):
            fired.append(True)
            action()
        return result

    monkeypatch.setattr(stage_module, "train_step", wrapped)


def test_both_stages_learn_and_leave_everything_a_run_promises(straight: Path, tiny_dir: Path) -> None:
    run = tiny_run(tiny_dir, straight)
    rows = metrics_of(run)
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i + 1) for s in ("align", "instruct") for i in range(6)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(r["label_tokens"] > 0 and r["tokens"] > r["label_tokens"] and r["peak_fraction"] > 0 for r in rows)
    assert set(rows[0]["lr"]) == {"connector"}
    assert set(rows[-1]["lr"]) == {"connector", "llm", "embeddings"}
    assert rows[0]["loss_by_source"].keys() == {"colours"}
    parts = json.loads((straight / "parts.json").read_text())
    assert {r["part"]: r["trainable"] > 0 for r in parts["align"]} == {
        "vision": False, "connector": True, "llm": False, "embeddings": False
    }  # fmt: skip
    before, after = ({r["part"]: r["sha256"] for r in parts[s]} for s in ("align", "instruct"))
    assert before["connector"] != after["connector"]
    assert before["vision"] == after["vision"]
    assert (straight / "config.yaml").is_file()
    assert model_folder(straight) == straight / "instruct" / "model"


def test_golden_two_stage_loss_curve(straight: Path, tiny_dir: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = losses_of(tiny_run(tiny_dir, straight))
    assert len(golden) == 12
    assert [(s, i) for s, i, _ in found] == [(s, i) for s, i, _ in golden]
    for (_, _, loss), (_, _, expected) in zip(found, golden, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("stage", "step"), [("align", 3), ("instruct", 4)])
def test_stopped_by_a_signal_and_resumed_equals_straight_bit_for_bit(
    stage: str, step: int, straight: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    interrupt_after(monkeypatch, stage, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        run_training(run)
    assert stopped.value.exit_code == 143
    assert (tmp_path / "out" / stage / "state" / f"step-{step}").is_dir()
    run_training(run)
    assert_same_bits(straight / "instruct" / "model", tmp_path / "out" / "instruct" / "model")
    assert losses_of(run) == losses_of(tiny_run(tiny_dir, straight))


def test_crashed_between_checkpoints_and_resumed_equals_straight_bit_for_bit(
    straight: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("power cut")

    run = tiny_run(tiny_dir, tmp_path / "out")
    interrupt_after(monkeypatch, "instruct", 5, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run_training(run)
    newest = sorted((tmp_path / "out" / "instruct" / "state").iterdir())[-1]
    assert newest.name == "step-4"
    run_training(run)
    assert_same_bits(straight / "instruct" / "model", tmp_path / "out" / "instruct" / "model")
    assert losses_of(run) == losses_of(tiny_run(tiny_dir, straight))


def test_a_damaged_checkpoint_is_passed_over_loudly(
    straight: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    interrupt_after(monkeypatch, "instruct", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_training(run)
    weights = tmp_path / "out" / "instruct" / "state" / "step-4" / "rank-00000-of-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    run_training(run)
    assert (
        "step-4 is not usable (rank-00000-of-00001.safetensors does not match its checksum)" in capsys.readouterr().err
    )
    assert_same_bits(straight / "instruct" / "model", tmp_path / "out" / "instruct" / "model")


def test_many_micro_batches_equal_one(straight: Path, tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(
        tiny_dir, tmp_path / "out", "stages.align.micro_batch_tokens=60", "stages.instruct.micro_batch_tokens=60"
    )
    run_training(run)
    wide = metrics_of(tiny_run(tiny_dir, straight))
    for cut, whole in zip(metrics_of(run), wide, strict=True):
        assert (cut["label_tokens"], cut["tokens"]) == (whole["label_tokens"], whole["tokens"])
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_finished_stages_are_skipped_and_a_stage_can_be_run_alone(tiny_dir: Path, tmp_path: Path, capsys) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    with pytest.raises(TrainingError, match="--stage instruct: its predecessor align is not finished"):
        run_training(run, only="instruct")
    run_training(run, only="align")
    assert not (tmp_path / "out" / "instruct" / "model").exists()
    stamp = (tmp_path / "out" / "align" / "done.json").stat().st_mtime_ns
    run_training(run)
    assert "align: already finished (6 steps" in capsys.readouterr().err
    assert (tmp_path / "out" / "align" / "done.json").stat().st_mtime_ns == stamp
    with pytest.raises(TrainingError, match=r"no such stage. Known: align, instruct"):
        run_training(run, only="tune")


def test_a_changed_configuration_is_refused_and_the_difference_shown(
    straight: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"stage\.lr: 0\.002 -> 0\.5.*allow_config_drift=true"):
        run_training(tiny_run(tiny_dir, tmp_path / "out", "stages.align.lr=0.5"))
    run_training(tiny_run(tiny_dir, tmp_path / "out", "stages.align.checkpoint.every_steps=3"))  # decides no result
    with pytest.raises(CheckpointError, match="holds a run and resume is never"):
        run_training(tiny_run(tiny_dir, tmp_path / "out", "resume=never"))


def test_a_damaged_or_foreign_model_folder_is_refused(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "instruct" / "model", tmp_path / "x")  # the name of the folder means nothing
    load_model(tmp_path / "x", dtype=torch.float32)
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    manifest["unchanged"]["vision"] = "0" * 64
    (tmp_path / "x" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"the base of part vision .* is not the one this model was trained on"):
        load_model(tmp_path / "x", dtype=torch.float32)
    (tmp_path / "x" / "connector.safetensors").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match=r"connector\.safetensors: damaged"):
        load_model(tmp_path / "x", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="not a vlit model folder"):
        model_folder(tmp_path)


def test_a_step_that_is_not_finite_is_not_applied_and_too_many_end_the_run(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage_module.train_step

    def poisoned(engine, batch, **kwargs):
        if batch.step in (1, 2):
            for parameter in engine.parameters.values():
                parameter.register_hook(lambda grad: grad * float("nan")) if batch.step == 1 else None
        return real(engine, batch, **kwargs)

    monkeypatch.setattr(stage_module, "train_step", poisoned)
    run = tiny_run(tiny_dir, tmp_path / "out", "stages.align.max_non_finite_steps=1")
    with pytest.raises(TrainingError, match=r"2 steps had a non-finite loss or gradient, max_non_finite_steps is 1"):
        run_training(run)
    lines = [json.loads(x) for x in (tmp_path / "out" / "align" / "non_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert len(lines[0]["sample_ids"]) == 6
    assert lines[0]["grad_norms"]["connector"] == "nan"


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.encoder.path=./nowhere", ModelError, r'model\.encoder\.path.*"\./nowhere"'),
        ("model.llm.path=./nowhere", ModelError, r'model\.llm\.path "\./nowhere": this folder does not exist'),
        ("stages.align.data.0.path=nowhere.json", DataError, r"nowhere\.json"),
        ("stages.align.data.0.images=nowhere", DataError, r"nowhere"),
        ("model.init_from=nowhere.bin", ModelError, r"nowhere\.bin"),
    ],
)
def test_what_is_missing_is_named_before_any_training(
    override: str, error: type[Exception], message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        run_training(tiny_run(tiny_dir, tmp_path / "out", override))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_starting_from_a_model_folder_needs_the_same_parts(straight: Path, tiny_dir: Path, tmp_path: Path) -> None:
    start = f"model.init_from={straight / 'align' / 'model'}"
    with pytest.raises(
        ModelError, match=r"model\.init_from .*its connector is .*'mlp'.*the configuration says .*'linear'"
    ):
        run_training(tiny_run(tiny_dir, tmp_path / "a", start, "model.connector=linear"))
    run = tiny_run(tiny_dir, tmp_path / "b", start, "stages.align=null")
    run_training(run)
    assert losses_of(run) == [row for row in losses_of(tiny_run(tiny_dir, straight)) if row[0] == "instruct"]


def test_bf16_keeps_fp32_masters_and_still_learns(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out", "runtime.precision=bf16", "stages.instruct.max_steps=3")
    run_training(run)
    state = load_file(next((tmp_path / "out" / "instruct" / "state").glob("step-*/rank-*.safetensors")))
    assert {t.dtype for t in state.values()} == {torch.float32}
    rows = losses_of(run)
    assert rows[5][2] < rows[0][2]
    model, _ = load_model(tmp_path / "out" / "instruct" / "model", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_lora_stage_saves_adapters_resumes_and_loads_with_the_same_logits(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = "stages.instruct.tuning={connector: full, llm: {mode: lora, rank: 4, alpha: 8, dropout: 0.1}}"
    run = tiny_run(tiny_dir, tmp_path / "a", tuning)
    run_training(run)
    again = tiny_run(tiny_dir, tmp_path / "b", tuning)
    interrupt_after(monkeypatch, "instruct", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run_training(again)
    run_training(again)
    assert_same_bits(tmp_path / "a" / "instruct" / "model", tmp_path / "b" / "instruct" / "model")
    names = {p.name for p in (tmp_path / "a" / "instruct" / "model").iterdir()}
    assert {"connector.safetensors", "llm_lora.safetensors"} <= names
    assert "llm" not in names
    model, manifest = load_model(tmp_path / "a" / "instruct" / "model", dtype=torch.float32)
    assert manifest["changed"] == ["connector"]
    assert any(".lora_" in n for n, _ in model.named_parameters())


def test_a_row_that_does_not_fit_in_memory_names_what_it_holds_and_what_to_change(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ReplicatedEngine, "loss", lambda self, row: torch.empty(1 << 50)
    )  # a real allocation that fails
    with pytest.raises(
        TrainingError, match=r"out of memory on a row of \d+ tokens with \d+ images.*micro_batch_tokens"
    ):
        run_training(tiny_run(tiny_dir, tmp_path / "out"))


def test_a_first_loss_as_bad_as_guessing_is_said_at_once(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(tiny_run(tiny_dir, tmp_path / "out", "stages.align.max_steps=1", "stages.instruct=null"))
    assert "the first loss is 6.05, guessing among 384 tokens gives 5.95" in capsys.readouterr().err
