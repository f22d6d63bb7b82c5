"""Answers on disk while an evaluation runs: ``answers/rank-N.jsonl``, append-only, one line a batch.

What all files hold together is what is done, so an evaluation may go on with another number of ranks. A batch is one line
and one write: a kill leaves it whole or, cut short at the end of its file, not there at all.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlit.errors import EvaluationError

Key = tuple[str, str]
"""Row and question id."""


class OtherRankFailedError(EvaluationError):
    """Another rank has failed and said why; this one stops too."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; ``seconds`` is its share of the time its batch took."""

    prediction: str
    seconds: float


class AnswerFiles:
    """The files of all ranks under ``folder``, followed as they grow; ``done`` is their union. A context manager: the
    folder is held until it ends.
    """

    def __init__(self, folder: Path, ids: set[str]) -> None:
        self.folder = folder
        self.done: dict[Key, Answer] = {}
        self._ids = ids
        self._read_bytes: dict[Path, int] = {}
        self._read_lines: dict[Path, int] = {}
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> AnswerFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def claim(self) -> None:
        """For the first rank, alone: nobody else is at work here, and last lines that a kill left incomplete go.

        Raises:
            EvaluationError: another evaluation, or a process left over from a killed one, still works in this folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._hold(exclusive=True):
            raise EvaluationError(
                f"{self.folder.parent}: another evaluation is still at work in this folder. Wait for it, stop it, or "
                "choose another folder (--out)."
            )
        self._mark.unlink(missing_ok=True)
        for path in self._files():
            held = path.read_bytes()
            whole = held.rfind(b"\n") + 1
            if whole < len(held):
                os.truncate(path, whole)

    def join(self) -> None:
        """For every rank, after the first has claimed the folder: hold it together, and read what is done."""
        self._hold(exclusive=False)
        self.follow()

    def follow(self) -> None:
        """Read what all files have gained since the last call; an unfinished last line is left for the next."""
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read_bytes[path] = self._read_bytes.get(path, 0) + len(new)
            for line in new.split(b"\n")[:-1]:
                self._read_lines[path] = number = self._read_lines.get(path, 0) + 1
                self._take(line, f"{path}#{number}")

    def append(self, rank: int, row: str, predictions: Mapping[str, str], seconds: float) -> None:
        """Write the answers of a batch (by question id) to this rank's file and wait for the disk."""
        answers = [{"question_id": name, "prediction": text} for name, text in predictions.items()]
        line = json.dumps({"row": row, "seconds": round(seconds, 6), "answers": answers}, ensure_ascii=False) + "\n"
        with (self.folder / f"rank-{rank}.jsonl").open("ab") as file:
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def fail(self, rank: int, error: BaseException) -> bool:
        """Tell the other ranks that this one cannot go on; False when another rank has already failed."""
        text = " ".join(str(error).split()) or type(error).__name__
        try:
            with self._mark.open("x", encoding="utf-8") as file:
                file.write(f"rank {rank}: {text}\n")
        except FileExistsError:
            return False
        except OSError:  # a full disk must not hide the error that is on its way
            return True
        return True

    def check(self) -> None:
        """OtherRankFailedError when another rank cannot go on."""
        if self._mark.is_file():
            raise OtherRankFailedError(self._mark.read_text(encoding="utf-8").strip())

    def _hold(self, *, exclusive: bool) -> bool:
        """Lock the folder for this process, alone or shared; False when others hold it. The system frees it at a kill."""
        try:
            import fcntl
        except ImportError:  # not on Windows
            return True
        if self._lock is None:
            self._lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return True  # also on file systems without locks

    @property
    def _mark(self) -> Path:
        return self.folder / "failed"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.jsonl"))

    def _take(self, line: bytes, place: str) -> None:
        try:
            record = json.loads(line)
            row, answers = str(record["row"]), record["answers"]
            seconds = float(record["seconds"]) / max(len(answers), 1)
            read = {(row, str(a["question_id"])): Answer(str(a["prediction"]), seconds) for a in answers}
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{place}: damaged line ({error!r}). Remove the line; its questions are asked again."
            ) from error
        for key, answer in read.items():
            if key[1] not in self._ids:
                raise EvaluationError(f'{place}: question "{key[1]}" is not in this benchmark. Choose another folder.')
            self.done.setdefault(key, answer)


def check_answers(texts: Sequence[Any], ids: Sequence[str], *, where: str) -> dict[str, str]:
    """Answers by question id; EvaluationError when one is missing or is no text."""
    if len(texts) != len(ids):
        raise EvaluationError(
            f'{where}: {len(ids)} questions ("{ids[0]}" ...) got {len(texts)} answers. '
            "The answerer must return one text per question."
        )
    for name, text in zip(ids, texts, strict=True):
        if not isinstance(text, str):
            raise EvaluationError(
                f'{where}, question "{name}": the answer is {text!r}, not a text. '
                "A failure to answer is an error, not a wrong answer; run again to ask what is still open."
            )
    return dict(zip(ids, texts, strict=True))
