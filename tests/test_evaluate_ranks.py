"""Several ranks answer one benchmark: the same bytes as one rank, killed and resumed or not, and never a rank that waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run, write_dataset
from vlit.errors import EvaluationError
from vlit.eval.answers import AnswerFiles, OtherRankFailedError
from vlit.eval.benchmark import Question
from vlit.eval.benchmarks.qa import QaBenchmark
from vlit.eval.rows import ROWS
from vlit.eval.run import evaluate, open_batches

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ("predictions.jsonl", "results.json")


def benchmark_of(folder: Path, questions: int) -> QaBenchmark:
    """Questions of different lengths, two pictures by name only (the answerers here do not open them)."""
    for number in range(2):
        (folder / f"{number}.png").write_bytes(bytes([number]))
    rows = [
        {"question_id": f"q{i}", "image": f"{i % 2}.png", "question": "Which" + " one" * (i % 5) + "?", "answer": "a1"}
        for i in range(questions)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return QaBenchmark("q", path, image_root=folder)


def by_batch(questions: list[Question]) -> list[str]:
    """Answers that depend on who else is in the batch, as rounding under padding can make a real model's."""
    longest = max(len(q.turn_text()) for q in questions)
    return [f"a{(longest + len(q.turn_text())) % 3}" for q in questions]


def on_ranks(
    world_size: int, answer: Callable[[int, list[Question]], list[str]], bench: QaBenchmark, out: Path
) -> list:
    """Run ``evaluate`` on threads as ranks; what each returned or raised."""
    barrier = threading.Barrier(world_size, timeout=20)
    outcome: list = [None] * world_size

    def run(rank: int) -> None:
        try:
            outcome[rank] = evaluate(
                lambda questions: answer(rank, questions), bench, out, batch_size=2, rank=rank, world_size=world_size,
                barrier=lambda: barrier.wait() and None,
            )  # fmt: skip
        except BaseException as error:
            outcome[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return outcome


@pytest.mark.parametrize(("questions", "world_size"), [(7, 2), (7, 3), (3, 5), (8, 4)])
def test_any_number_of_ranks_writes_the_bytes_of_one(tmp_path: Path, questions: int, world_size: int) -> None:
    bench = benchmark_of(tmp_path, questions)
    evaluate(by_batch, bench, tmp_path / "one", batch_size=2)
    asked: Counter[str] = Counter()

    def answer(rank: int, batch: list[Question]) -> list[str]:
        asked.update(q.id for q in batch)
        time.sleep(0.02 * rank)  # the first rank is done long before the last
        return by_batch(batch)

    outcome = on_ranks(world_size, answer, bench, tmp_path / "many")
    assert outcome[0]["n"] == questions
    assert outcome[1:] == [{}] * (world_size - 1)
    assert set(asked.values()) == {len(ROWS)}
    for name in RESULTS:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 2), (1, 3)])
def test_an_evaluation_goes_on_with_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    """Some ranks are cut short at different points; nothing that is on disk is asked again."""
    bench = benchmark_of(tmp_path, 9)
    evaluate(by_batch, bench, tmp_path / "one", batch_size=2)
    out = tmp_path / "many"
    answered: Counter[tuple] = Counter()

    def dies(rank: int, batch: list[Question]) -> list[str]:
        if len(list((out / "answers").glob(f"rank-{rank}.jsonl"))) and rank != 1:
            raise KeyboardInterrupt
        answered.update((q.id, q.images) for q in batch)
        return by_batch(batch)

    first = on_ranks(before, dies, bench, out)
    assert isinstance(first[0], KeyboardInterrupt)
    on_disk = sum(answered.values())
    assert 0 < on_disk < 27
    for path in (out / "answers").glob("rank-*.jsonl"):
        with path.open("ab") as file:
            file.write(b'{"row": "bli')  # a kill in the middle of a write

    def finishes(rank: int, batch: list[Question]) -> list[str]:
        answered.update((q.id, q.images) for q in batch)
        return by_batch(batch)

    assert on_ranks(after, finishes, bench, out)[0]["n"] == 9
    assert sum(answered.values()) == 27
    assert set(answered.values()) == {1}
    for name in RESULTS:
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_an_error_on_one_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    def answer(rank: int, batch: list[Question]) -> list[str]:
        if rank == 1:
            raise EvaluationError("no picture today")
        time.sleep(0.1)
        return by_batch(batch)

    outcome = on_ranks(3, answer, benchmark_of(tmp_path, 40), tmp_path / "out")
    assert str(outcome[1]) == "no picture today"
    for other in (outcome[0], outcome[2]):
        assert isinstance(other, OtherRankFailedError)
        assert "rank 1: no picture today" in str(other)
    assert not (tmp_path / "out" / "results.json").exists()
    assert on_ranks(2, lambda rank, batch: by_batch(batch), benchmark_of(tmp_path, 40), tmp_path / "out")[0]["n"] == 40


def test_two_evaluations_do_not_work_in_one_folder(tmp_path: Path) -> None:
    bench = benchmark_of(tmp_path, 3)
    evaluate(by_batch, bench, tmp_path / "out")
    with AnswerFiles(tmp_path / "out" / "answers", {"q0", "q1", "q2"}) as left_over:
        left_over.join()
        with pytest.raises(EvaluationError, match="another evaluation is still at work"):
            evaluate(by_batch, bench, tmp_path / "out")
    evaluate(lambda questions: pytest.fail("asked again"), bench, tmp_path / "out")


def test_batches_hold_questions_of_like_length_and_do_not_depend_on_what_is_done(tmp_path: Path) -> None:
    asked = {"image": benchmark_of(tmp_path, 11).load()}
    batches = open_batches(asked, {}, 4)
    lengths = [[len(q.question) for q in batch] for _, batch in batches]
    assert [len(batch) for _, batch in batches] == [4, 4, 3]
    in_order = [length for batch in lengths for length in batch]
    assert in_order == sorted(in_order, reverse=True)
    done = {("image", q.id): None for q in batches[1][1]}
    assert open_batches(asked, done, 4) == [batches[0], batches[2]]


# --- with torchrun ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two trained steps a stage."""
    from vlit.train.run import run_training

    out = tmp_path_factory.mktemp("trained") / "out"
    run_training(tiny_run(tiny_dir, out, "stages.align.max_steps=2", "stages.instruct.max_steps=2"))
    return out


@pytest.fixture(scope="module")
def questions(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a benchmark with 11 questions, text-only ones among them."""
    write_dataset(tiny_dir / "dataset")
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    rows = [
        {"question_id": f"q{i}", "question": "Which colour" + " now" * (i % 4) + "?", "answer": "red", "kind": "c"}
        | ({} if i % 5 == 4 else {"image": f"{i:03d}_0.png"})
        for i in range(11)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"path={path}", f"images={tiny_dir / 'dataset'}"]


def eval_words(checkpoint: Path, out: Path, ranks: int, *more: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [*launcher, "scripts/eval.py", "--checkpoint", str(checkpoint), "--benchmark", "qa", "--out", str(out)]
    return [
        sys.executable,
        *words,
        "--rows",
        "image,blind,shuffled",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "4",
        *more,
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run_eval(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def one_rank(trained: Path, questions: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    done = run_eval(eval_words(trained, out, 1, *questions))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 33
    return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_writes_the_bytes_of_one_process(
    trained: Path, questions: list[str], one_rank: Path, tmp_path: Path, ranks: int
) -> None:
    done = run_eval(eval_words(trained, tmp_path / "e", ranks, *questions))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("results  ") == 1
    shares = [path.read_text().count("question_id") for path in sorted((tmp_path / "e" / "answers").glob("rank-*"))]
    assert len(shares) == ranks
    assert sum(shares) == 33
    for name in RESULTS:
        assert (tmp_path / "e" / name).read_bytes() == (one_rank / name).read_bytes()


def test_killed_on_two_ranks_and_finished_on_three(
    trained: Path, questions: list[str], one_rank: Path, tmp_path: Path
) -> None:
    """kill -9 of launcher and ranks in the middle."""
    words = eval_words(trained, tmp_path / "e", 2, *questions)
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    answers = tmp_path / "e" / "answers"
    while process.poll() is None and sum(p.read_text().count("\n") for p in answers.glob("rank-*.jsonl")) < 3:
        time.sleep(0.002)
    for pid in [*_children(process.pid), process.pid]:  # ranks have sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "e" / "results.json").exists()
    time.sleep(0.2)
    before = {path: path.read_text() for path in answers.glob("rank-*.jsonl")}
    done = run_eval(eval_words(trained, tmp_path / "e", 3, *questions))
    assert done.returncode == 0, done.stderr[-3000:]
    for path, text in before.items():
        assert path.read_text().startswith(text[: text.rfind("\n") + 1])
    written = [
        (record["row"], answer["question_id"])
        for path in answers.glob("rank-*.jsonl")
        for record in map(json.loads, path.read_text().splitlines())
        for answer in record["answers"]
    ]
    assert len(written) == len(set(written)) == 33
    for name in RESULTS:
        assert (tmp_path / "e" / name).read_bytes() == (one_rank / name).read_bytes()


def test_a_failing_rank_ends_all_with_one_line_that_names_it(trained: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Eight questions in two batches; the second batch, which is rank 1's, has a picture that cannot be decoded."""
    rows = [{"question_id": f"q{i}", "image": f"{i:03d}_0.png", "question": "?", "answer": "x"} for i in range(4)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for row in rows:
        (tmp_path / row["image"]).write_bytes((tiny_dir / "dataset" / row["image"]).read_bytes())
    rows[3]["image"] = "broken.png"
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = eval_words(trained, tmp_path / "e", 2, f"path={path}", "--rows", "image")
    done = run_eval(words)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: rank 1 of 2: ")
    assert "broken.png" in lines[0]


def test_a_mistake_of_the_command_is_told_once(trained: Path, tmp_path: Path) -> None:
    done = run_eval(eval_words(trained, tmp_path / "e", 2, f"path={tmp_path}/none.jsonl"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    assert "no such question file" in lines[0]


def _children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*(grandchild for child in found for grandchild in _children(child)), *found]
