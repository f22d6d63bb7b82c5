"""Whole runs on records that share images: plan, metrics, resume, refusal under dropout, quarantine of a shared picture."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.test_train_run import assert_same_bits, interrupt_after
from tests.tiny_run import losses_of, metrics_of, tiny_run, write_dataset
from vlit.config.schema import RunConfig
from vlit.data.load import StepLoader
from vlit.data.share import single
from vlit.data.stage_order import share_at_most
from vlit.data.tokenize import SampleTokenizer
from vlit.models.assemble import model_spec
from vlit.train.identity import open_mixture
from vlit.train.run import run_training
from vlit.train.signals import Interrupted

QUESTIONS = ("Which colour?", "Name the colour of this picture, please.", "Is it red?", "What do you see?")


@pytest.fixture(scope="module")
def shared_data(tiny_dir: Path) -> Path:
    """Eight pictures with four one-turn records each, one with a single record, and three text-only records."""
    folder = tiny_dir / "dataset"
    pictures = [
        row["image"] for row in json.loads(write_dataset(folder).read_text()) if isinstance(row.get("image"), str)
    ]
    rows = [
        {"id": f"p{p}q{q}", "image": picture, "conversations": turns(f"<image>\n{question}", f"Answer {p} {q}.")}
        for p, picture in enumerate(pictures[:8])
        for q, question in enumerate(QUESTIONS)
    ]
    rows.append({"id": "alone", "image": pictures[8], "conversations": turns("<image>\nWhy?", "No reason.")})
    rows += [{"id": f"t{n}", "conversations": turns("One and one?", "Two.")} for n in range(3)]
    path = folder / "shared.json"
    path.write_text(json.dumps(rows))
    return path


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def shared_run(tiny_dir: Path, out: Path, data: Path, *overrides: str) -> RunConfig:
    paths = [f"stages.{stage}.data=[{{path: {data}, name: shared}}]" for stage in ("align", "instruct")]
    batches = ["stages.align.global_batch=12", "stages.instruct.global_batch=12"]
    return tiny_run(tiny_dir, out, *paths, *batches, *overrides)


def test_a_shared_run_learns_what_a_run_on_separate_records_in_the_same_order_learns(
    shared_data: Path,
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = shared_run(tiny_dir, tmp_path / "shared", shared_data)
    run_training(shared)
    assert "records share an image; computing it once saves" in capsys.readouterr().err
    rows = metrics_of(shared)
    assert all(row["shared_tokens_saved"] > 0 for row in rows)
    assert all(row["images"] < row["samples"] for row in rows)
    monkeypatch.setattr(
        "vlit.data.load.share_prefixes", lambda samples, files, limit: [single(n, s) for n, s in enumerate(samples)]
    )
    separate = shared_run(tiny_dir, tmp_path / "separate", shared_data)
    run_training(separate)
    for ours, theirs in zip(rows, metrics_of(separate), strict=True):
        assert theirs["shared_tokens_saved"] == 0
        assert ours["label_tokens"] == theirs["label_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_interrupted_and_resumed_equals_straight_bit_for_bit(
    shared_data: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = shared_run(tiny_dir, tmp_path / "straight", shared_data)
    run_training(straight)
    run = shared_run(tiny_dir, tmp_path / "out", shared_data)
    interrupt_after(monkeypatch, "instruct", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_training(run)
    run_training(run)
    assert_same_bits(tmp_path / "straight" / "instruct" / "model", tmp_path / "out" / "instruct" / "model")
    assert losses_of(run) == losses_of(straight)


def test_dropout_in_a_trained_part_switches_sharing_off_and_says_so(
    shared_data: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    lora = "stages.instruct.tuning={connector: full, llm: {mode: lora, rank: 4, alpha: 8, dropout: 0.1}}"
    run = shared_run(tiny_dir, tmp_path, shared_data, lora)
    assert share_at_most(run, "align") == (8, None)
    limit, why = share_at_most(run, "instruct")
    assert limit == 1
    assert "tuning.llm.dropout 0.1" in str(why)
    forced = shared_run(tiny_dir, tmp_path, shared_data, lora, "data.share_images=on")
    assert share_at_most(forced, "instruct") == (8, None)
    off = shared_run(tiny_dir, tmp_path, shared_data, "data.share_images=off")
    assert share_at_most(off, "align") == (1, None)


def test_a_damaged_shared_picture_takes_its_records_with_it_and_no_others(
    shared_data: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = json.loads(shared_data.read_text())
    for name in {row["image"] for row in rows if "image" in row}:
        (folder / name).write_bytes((shared_data.parent / name).read_bytes())
    bad = rows[5]["image"]
    (folder / bad).write_bytes(b"no picture")
    path = folder / "shared.json"
    path.write_text(json.dumps(rows))
    run = shared_run(tiny_dir, tmp_path / "out", path, "data.on_bad_sample=quarantine", "data.quarantine_budget=0.5")
    mixture = open_mixture(run, "instruct", progress=False)
    assert mixture.share_at_most == 8
    loader = StepLoader(
        mixture, SampleTokenizer(model_spec(run.model), run.data), run.data, global_batch=12, micro_batch_tokens=400,
        total_steps=3, num_workers=0,
    )  # fmt: skip
    steps = list(loader)
    seen = Counter(name for step in steps for row in step.micro_batches for name in row.sample_ids)
    lost = {row["id"] for row in rows if row.get("image") == bad}
    assert len(lost) == 4
    assert seen == Counter(row["id"] for row in rows if row["id"] not in lost)
    assert sum(len(step.quarantined) for step in steps) == 4
    images = sum(row.num_images for step in steps for row in step.micro_batches)
    assert images < 20, "each picture is decoded about once, not once a record"


def test_z_loss_pulls_the_logits_and_is_left_out_of_the_reported_loss(
    shared_data: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    plain = shared_run(tiny_dir, tmp_path / "plain", shared_data, "stages.instruct=null", "stages.align.max_steps=2")
    pulled = shared_run(
        tiny_dir,
        tmp_path / "pulled",
        shared_data,
        "stages.instruct=null",
        "stages.align.max_steps=2",
        "stages.align.z_loss=0.1",
    )
    run_training(plain)
    run_training(pulled)
    before, after = metrics_of(plain), metrics_of(pulled)
    assert before[0]["loss"] == after[0]["loss"]
    assert before[0]["grad_norm"] != after[0]["grad_norm"]
    assert before[1]["loss"] != after[1]["loss"]
    assert torch.isfinite(torch.tensor(after[1]["loss"]))
