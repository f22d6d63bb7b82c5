"""The command line end to end on tiny parts: train under torchrun, evaluate, chat, preview, export; errors on one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.tiny_run import tiny_run

ROOT = Path(__file__).resolve().parent.parent


def command(*words: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True, capture_output=True, input=stdin, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration file, output folder) of a run started as users start it, with torchrun."""
    folder = tmp_path_factory.mktemp("cli")
    run = tiny_run(tiny_dir, folder / "out")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "scripts/train.py", "--config", str(config)]
    done = command(*torchrun, "stages.instruct.max_steps=4")
    assert "report" in done.stderr
    return config, folder / "out"


def test_training_under_torchrun_writes_model_and_report(trained: tuple[Path, Path]) -> None:
    _, out = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "instruct" / "model" / "manifest.json").is_file()


def test_two_ranks_learn_what_one_rank_learns(tiny_dir: Path, tmp_path: Path) -> None:
    """Uneven packs: 6 and 4 records a step over two processes, some without an image."""
    losses = []
    for ranks in (1, 2):
        run = tiny_run(tiny_dir, tmp_path / f"ranks{ranks}", "stages.instruct.micro_batch_tokens=150")
        config = tmp_path / f"ranks{ranks}.yaml"
        config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        command(*torchrun, "scripts/train.py", "--config", str(config))
        rows = (tmp_path / f"ranks{ranks}" / "metrics.jsonl").read_text().splitlines()
        losses.append([(json.loads(row)["loss"], json.loads(row)["label_tokens"]) for row in rows])
    assert len(losses[0]) == 12
    for (one, labels_one), (two, labels_two) in zip(*losses, strict=True):
        assert labels_one == labels_two
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("rows_before_kill", [3, 9])
def test_killed_and_started_again_ends_with_the_same_model(
    rows_before_kill: int, tiny_dir: Path, tmp_path: Path
) -> None:
    """kill -9 of all processes in the middle of stage 1 or 2, then the same command again."""
    models = []
    for name in ("straight", "killed"):
        run = tiny_run(tiny_dir, tmp_path / name)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        words = ("scripts/train.py", "--config", str(config))
        if name == "killed":
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
            )
            metrics = tmp_path / name / "metrics.jsonl"
            while process.poll() is None and (
                not metrics.is_file() or metrics.read_text().count("\n") < rows_before_kill
            ):
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not (tmp_path / name / "instruct" / "done.json").exists()
        command(*words)
        model = tmp_path / name / "instruct" / "model"
        models.append({str(p.relative_to(model)): p.read_bytes() for p in sorted(model.rglob("*.safetensors"))})
        steps = [json.loads(row)["step"] for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 7), *range(1, 7)]
    assert len(models[0]) >= 2
    assert models[0] == models[1]


def test_eval_answers_a_question_file_and_resumes(trained: tuple[Path, Path], tiny_dir: Path, tmp_path: Path) -> None:
    _, out = trained
    questions = tmp_path / "questions.jsonl"
    rows = [
        {
            "question_id": f"q{i}",
            "image": f"{i:03d}_0.png",
            "question": "Which colour?",
            "answer": "red",
            "kind": "colour",
        }
        for i in range(3)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = (
        *("scripts/eval.py", "--checkpoint", str(out), "--benchmark", "qa", "--rows", "image,blind,shuffled"),
        *("--out", str(tmp_path / "e"), "--max-new-tokens", "4", f"path={questions}", f"images={tiny_dir / 'dataset'}"),
    )
    command(*words)
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["n"] == 3
    assert set(results["rows"]) == {"image", "blind", "shuffled"}
    first = (tmp_path / "e" / "predictions.jsonl").read_text()
    assert len(first.splitlines()) == 9
    command(*words)
    assert (tmp_path / "e" / "predictions.jsonl").read_text() == first


def test_chat_streams_an_answer_and_keeps_several_turns(trained: tuple[Path, Path], tiny_dir: Path) -> None:
    _, out = trained
    picture = str(tiny_dir / "dataset" / "000_0.png")
    words = ("scripts/chat.py", "--checkpoint", str(out / "instruct"), "--image", picture, "--max-new-tokens", "5")
    once = command(*words, "--prompt", "Which colour?").stdout
    twice = command(*words, stdin="Which colour?\nAre you sure?\n").stdout
    assert once.strip()
    assert twice.splitlines()[0] == once.splitlines()[0]
    assert len(twice.splitlines()) == 2


def test_export_loads_in_transformers(trained: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    _, out = trained
    command("scripts/export.py", "--checkpoint", str(out), "--to", "hf", "--out", str(tmp_path / "hf"))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")


def test_preview_shows_pictures_and_tokens(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = trained
    page = tmp_path / "preview.html"
    done = command("scripts/preview.py", "--config", str(config), "--samples", "3", "--out", str(page))
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/") >= 3
    assert "colours" in html
    assert done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "--config", "configs/nope.yaml"), "configs/nope.yaml: no such configuration file"),
        (("train", "--config", "configs/stage2.yaml", "stages.instruct.lrr=1"), 'Did you mean "lr"?'),
        (("eval", "--checkpoint", "/nowhere", "--benchmark", "qa", "path=x"), "x: "),
        (("eval", "--checkpoint", "/nowhere", "--benchmark", "quiz"), 'unknown benchmark type "quiz"'),
        (("chat", "--checkpoint", "/nowhere", "--image", "/no.png"), "--image /no.png: no such file"),
        (("export", "--checkpoint", "/nowhere", "--out", "/tmp/x"), "not a vlit model folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(words: tuple[str, ...], expected: str) -> None:
    done = command("-m", "vlit.cli", *words, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in done.stderr
