"""Ask a benchmark, write every answer down as it comes, and score at the end. Interrupted evaluations resume.

The folder of an evaluation holds ``settings.json`` (what is asked, of which checkpoint), ``answers/`` (see
:mod:`vlit.eval.answers`) and, when all rows are complete, ``predictions.jsonl`` (one answer a line, in question order),
``results.json`` and ``timing.json``.

Several ranks share the work. It is cut into *batches*, a pure function of the questions and the batch size, and the open
batches are dealt out in turn. Which questions stand in a batch together (and so their padding and rounding) depends neither
on the number of ranks nor on interruptions; hence predictions and results are the same bytes. There is no collective
operation while answering: ranks may be as uneven as they like.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlit.errors import EvaluationError
from vlit.eval.answers import Answer, AnswerFiles, Key, OtherRankFailedError, check_answers
from vlit.eval.benchmark import Benchmark, Question, fingerprint
from vlit.eval.rows import ROWS, ask_row

Answerer = Callable[[list[Question]], list[str]]
"""Answers a batch: one text per question, in order. Pictures are ``Question.images``, the user turn is
``Question.turn_text()``. It raises when it cannot answer; an empty text is an answer (a wrong one)."""

Progress = Callable[[int, int], None]
"""Called on rank 0 as ``progress(answered, total)``, all rows and ranks together."""

Batch = tuple[str, list[Question]]
"""A row and questions that are answered together."""

_POLL_SECONDS = 0.2


def evaluate(
    answerer: Answerer,
    benchmark: Benchmark,
    out_dir: Path,
    *,
    rows: Sequence[str] = ROWS,
    batch_size: int = 32,
    seed: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Ask every question once per row and return what ``results.json`` holds (on other ranks than 0: ``{}``).

    Args:
        rows: of ``image``, ``blind``, ``shuffled``; the first one is the headline.
        batch_size: questions handed to ``answerer`` at once.
        seed: decides which pictures the shuffled row shows.
        checkpoint: what is asked, for the record and to keep a folder from mixing two models. Put a hash of the weights
            into ``settings`` when the same path may hold other weights later.
        settings: further JSON-able facts that change answers (precision, max_new_tokens, template ...).
        rank, world_size: this process among those that call ``evaluate`` with the same arguments on the same folder.
        barrier: waits for all ranks. Called twice, before the first question; ranks that end early do not wait.

    Raises:
        OtherRankFailedError: another rank failed; it raises what went wrong there.
        EvaluationError: the folder holds another evaluation, or the answerer returned something that is no answer.
            Whatever the answerer raises passes through; the answers given before it stay on disk.
    """
    questions = benchmark.load()
    identity = {
        "benchmark": benchmark.name,
        "checkpoint": checkpoint,
        "questions_sha256": fingerprint(questions),
        "num_questions": len(questions),
        "seed": seed,
        "settings": json.loads(json.dumps(dict(settings or {}))),
    }
    asked = {row: ask_row(questions, row, seed=seed) for row in rows}
    total = len(questions) * len(asked)
    with AnswerFiles(out_dir / "answers", {question.id for question in questions}) as files:
        if rank == 0:
            files.claim()
            _claim(out_dir / "settings.json", identity)
        barrier()
        _compare(out_dir / "settings.json", identity)
        files.join()
        work = open_batches(asked, files.done, batch_size)[rank::world_size]
        barrier()  # nobody writes before all have read

        def report() -> int:
            files.follow()
            answered = sum(row in asked for row, _ in files.done)
            if progress is not None:
                progress(answered, total)
            return answered

        try:
            for row, batch in work:
                files.check()
                _ask(answerer, row, batch, files, rank=rank, where=f"{benchmark.name}, row {row}")
                if rank == 0:
                    report()
            while rank == 0 and report() < total:
                files.check()
                time.sleep(_POLL_SECONDS)
        except OtherRankFailedError:
            raise
        except Exception as error:
            if world_size > 1 and not files.fail(rank, error):
                raise OtherRankFailedError(f"rank {rank}: stopped, another rank had failed before it.") from error
            raise
        return _write(out_dir, identity, benchmark, questions, asked, files.done) if rank == 0 else {}


def _ask(answerer: Answerer, row: str, batch: list[Question], files: AnswerFiles, *, rank: int, where: str) -> None:
    """Answer one batch and write it down."""
    began = time.perf_counter()
    texts = answerer(batch)
    seconds = time.perf_counter() - began
    files.append(rank, row, check_answers(texts, [q.id for q in batch], where=where), seconds)


def open_batches(asked: Mapping[str, Sequence[Question]], done: Mapping[Key, Answer], batch_size: int) -> list[Batch]:
    """What is still to do, in batches of like length (fewer padding tokens), the longest first (memory runs out early).

    The cut does not depend on ``done``: after a kill the very same batches are asked that a straight run would ask.
    """
    found: list[Batch] = []
    for row, questions in asked.items():
        ordered = sorted(questions, key=lambda q: (-len(q.images), -len(q.question)))
        for start in range(0, len(ordered), batch_size):
            batch = [q for q in ordered[start : start + batch_size] if (row, q.id) not in done]
            if batch:
                found.append((row, batch))
    return found


def _write(
    out_dir: Path,
    identity: dict[str, Any],
    benchmark: Benchmark,
    questions: Sequence[Question],
    asked: Mapping[str, Sequence[Question]],
    done: Mapping[Key, Answer],
) -> dict[str, Any]:
    """Predictions in question order, scores, and the time it took (which is the only thing that differs between runs)."""
    lines = []
    results = identity | {"rows": {}}
    seconds: dict[str, float] = {}
    for row, variants in asked.items():
        for question in variants:
            text = done[row, question.id].prediction
            names = [str(path) for path in question.images]
            record = {
                "question_id": question.id,
                "kind": question.kind,
                "image": names[0] if len(names) == 1 else names,
                "question": question.question,
                "answer": question.answers[0] if len(question.answers) == 1 else list(question.answers),
                "prediction": text,
                "correct": benchmark.score_one(question, text),
                "row": row,
            }
            lines.append(json.dumps(record, ensure_ascii=False))
        results["rows"][row] = benchmark.score({q.id: done[row, q.id].prediction for q in questions}).to_dict()
        seconds[row] = round(sum(done[row, q.id].seconds for q in questions), 3)
    headline = results["rows"][next(iter(asked))]
    results |= {
        key: headline[key] for key in ("n", "accuracy", "ci_low", "ci_high", "chance", "macro_accuracy", "per_kind")
    }
    write_atomically(out_dir / "predictions.jsonl", "\n".join(lines) + "\n")
    timing = {"seconds": round(sum(seconds.values()), 3), "seconds_per_row": seconds}
    write_atomically(out_dir / "timing.json", json.dumps(timing, indent=2) + "\n")
    write_atomically(out_dir / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Write down what this folder evaluates, or check that it is the same as before (every rank does)."""
    if not path.is_file():
        if path.with_name("predictions.jsonl").exists() or any(path.with_name("answers").glob("rank-*.jsonl")):
            raise EvaluationError(
                f"{path.parent}: has answers but no settings.json, so nobody knows whose answers these are. "
                "Remove the folder."
            )
        write_atomically(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
    _compare(path, identity)


def _compare(path: Path, identity: dict[str, Any]) -> None:
    try:
        held = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}). Remove its folder and evaluate again.") from error
    for key, value in identity.items():
        if held.get(key) != value:
            raise EvaluationError(
                f"{path.parent}: holds an evaluation with another {key} ({held.get(key)!r}, now {value!r}). "
                "Choose another folder, or remove this one to start again."
            )


def write_atomically(path: Path, text: str) -> None:
    """Written aside, flushed to disk, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
