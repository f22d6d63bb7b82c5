"""Ask a benchmark, write every answer down as it comes, and score at the end. Interrupted evaluations resume.

The folder of an evaluation holds ``settings.json`` (what is asked, of which checkpoint), ``predictions.jsonl`` (one
answer a line, appended batch by batch) and, when all rows are complete, ``results.json``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlit.errors import EvaluationError
from vlit.eval.benchmark import Benchmark, Question, fingerprint
from vlit.eval.rows import ROWS, ask_row

Answerer = Callable[[list[Question]], list[str]]
"""Answers a batch: one text per question, in order. Pictures are ``Question.images``, the user turn is
``Question.turn_text()``. It raises when it cannot answer; an empty text is an answer (a wrong one)."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(row, answered, total)`` after every batch."""


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
) -> dict[str, Any]:
    """Ask every question once per row and return what ``results.json`` holds.

    Args:
        rows: of ``image``, ``blind``, ``shuffled``; the first one is the headline.
        batch_size: questions handed to ``answerer`` at once.
        seed: decides which pictures the shuffled row shows.
        checkpoint: what is asked, for the record and to keep a folder from mixing two models. Put a hash of the weights
            into ``settings`` when the same path may hold other weights later.
        settings: further JSON-able facts that change answers (precision, max_new_tokens, template ...).

    Raises:
        EvaluationError: the folder holds another evaluation, or the answerer returned something that is no answer.
            Whatever the answerer raises passes through; the answers given before it stay on disk.
    """
    questions = benchmark.load()
    out_dir.mkdir(parents=True, exist_ok=True)
    identity = {
        "benchmark": benchmark.name,
        "checkpoint": checkpoint,
        "questions_sha256": fingerprint(questions),
        "num_questions": len(questions),
        "seed": seed,
        "settings": json.loads(json.dumps(dict(settings or {}))),
    }
    _claim(out_dir / "settings.json", identity)
    answers_file = out_dir / "predictions.jsonl"
    done = _read_answers(answers_file, {question.id for question in questions})
    asked = {row: ask_row(questions, row, seed=seed) for row in rows}
    with answers_file.open("a", encoding="utf-8") as file:
        for row, variants in asked.items():
            _ask(answerer, benchmark, variants, file, row=row, done=done, batch_size=batch_size, progress=progress)
    results = identity | {"rows": {}, "seconds": 0.0}
    for row in rows:
        scored = benchmark.score({q.id: str(done[row, q.id]["prediction"]) for q in questions}).to_dict()
        scored["seconds"] = round(sum(float(done[row, q.id]["seconds"]) for q in questions), 3)
        results["rows"][row] = scored
        results["seconds"] = round(results["seconds"] + scored["seconds"], 3)
    headline = results["rows"][rows[0]]
    results |= {
        key: headline[key] for key in ("n", "accuracy", "ci_low", "ci_high", "chance", "macro_accuracy", "per_kind")
    }
    _write_json(out_dir / "results.json", results)
    return results


def _ask(
    answerer: Answerer,
    benchmark: Benchmark,
    questions: Sequence[Question],
    file: Any,
    *,
    row: str,
    done: dict[tuple[str, str], dict[str, Any]],
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Answer what ``done`` lacks of one row, appending to ``file`` and ``done`` batch by batch."""
    open_questions = [question for question in questions if (row, question.id) not in done]
    answered = len(questions) - len(open_questions)
    for start in range(0, len(open_questions), batch_size):
        batch = open_questions[start : start + batch_size]
        began = time.perf_counter()
        texts = answerer(batch)
        seconds = (time.perf_counter() - began) / len(batch)
        if len(texts) != len(batch):
            raise EvaluationError(
                f'{benchmark.name}, row {row}: {len(batch)} questions ("{batch[0].id}" ...) got {len(texts)} answers. '
                "The answerer must return one text per question."
            )
        for question, text in zip(batch, texts, strict=True):
            if not isinstance(text, str):
                raise EvaluationError(
                    f'{benchmark.name}, row {row}, question "{question.id}": the answer is {text!r}, not a text. '
                    "A failure to answer is an error, not a wrong answer; run again to ask what is still open."
                )
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
                "seconds": round(seconds, 6),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done[row, question.id] = record
        file.flush()
        os.fsync(file.fileno())
        answered += len(batch)
        if progress is not None:
            progress(row, answered, len(questions))


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Write down what this folder evaluates, or check that it is the same as before."""
    if not path.is_file():
        if path.with_name("predictions.jsonl").exists():
            raise EvaluationError(
                f"{path.parent}: has predictions.jsonl but no settings.json, so nobody knows whose answers these are. "
                "Remove the folder."
            )
        _write_json(path, identity)
        return
    held = _read_json(path)
    for key, value in identity.items():
        if held.get(key) != value:
            raise EvaluationError(
                f"{path.parent}: holds an evaluation with another {key} ({held.get(key)!r}, now {value!r}). "
                "Choose another folder, or remove this one to start again."
            )


def _read_answers(path: Path, ids: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Answers already given; a last line that a kill cut short is removed from the file and asked again."""
    done: dict[tuple[str, str], dict[str, Any]] = {}
    if not path.is_file():
        return done
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            key = (record["row"], record["question_id"])
            float(record["seconds"]), str(record["prediction"])
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path}#{number}: damaged line ({error!r}). Remove the line; its question is asked again."
            ) from error
        if key[1] not in ids:
            raise EvaluationError(
                f'{path}#{number}: question "{key[1]}" is not in this benchmark. Choose another folder.'
            )
        done[key] = record
    return done


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}). Remove its folder and evaluate again.") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Atomic: written aside, flushed to disk, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
