"""A conversation about images in the terminal: streaming, several turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlit.answer import Answerer, Request, ask
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.serve.commands import load_answerer
from vlit.types import Turn

HELP = "Ask a question. /image FILE adds a picture, /reset starts over, /exit leaves."


class Conversation:
    """Turns so far; every answer sees all of them, so the second question may refer to the first."""

    def __init__(self, answerer: Answerer, images: Sequence[Path] = ()) -> None:
        self.answerer = answerer
        self.turns: list[Turn] = []
        self.images: list[Path] = []
        self._waiting = list(images)

    def add_image(self, path: Path) -> None:
        """Show ``path`` with the next question."""
        _require_file(path)
        self._waiting.append(path)

    def reset(self) -> None:
        """Forget all turns; the pictures are shown again with the next question."""
        self._waiting = [*self.images, *self._waiting]
        self.turns, self.images = [], []

    def say(self, question: str, *, temperature: float = 0.0, stream: Any = None) -> str:
        """Answer ``question``; pieces of the answer are written to ``stream`` as they come."""
        turn = ask(question, self._waiting).turns[0]
        images = [*self.images, *self._waiting]
        request = Request((*self.turns, turn), tuple(images))
        streamer = _Streamer(self.answerer.tokenizer, stream) if stream is not None else None
        (made,) = self.answerer.answers([request], temperature=temperature, streamer=streamer)
        self.turns += [turn, Turn("assistant", made.text)]
        self.images, self._waiting = images, []
        return made.text


class _Streamer:
    """transformers' streamer protocol: ``put`` receives ids as they are made, ``end`` closes the line. Ids that may begin
    what ends an answer are held back until they do not.
    """

    def __init__(self, tokenizer: SampleTokenizer, stream: Any) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.stops = tokenizer.stop_sequences()
        self.ids: list[int] = []
        self.written = ""

    def put(self, value: Any) -> None:
        self.ids += value.reshape(-1).tolist()
        begun = (n for stop in self.stops for n in range(1, len(stop) + 1) if self.ids[-n:] == stop[:n])
        self._write(len(self.ids) - max(begun, default=0))

    def _write(self, count: int) -> None:
        """Write the text of the first ``count`` ids as far as it is not written yet."""
        text = self.tokenizer.decode(self.ids[:count]).lstrip()
        if text.startswith(self.written) and not text.endswith("\ufffd"):
            self.stream.write(text[len(self.written) :])
            self.stream.flush()
            self.written = text

    def end(self) -> None:
        ended = (len(stop) for stop in self.stops if self.ids[-len(stop) :] == stop)
        self._write(len(self.ids) - max(ended, default=0))
        self.stream.write("\n")
        self.stream.flush()


def chat(
    checkpoint: Path,
    images: Sequence[Path],
    *,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    trust_remote_code: bool = False,
) -> None:
    """Answer ``prompt`` once, or read questions from the terminal until end of input."""
    for path in images:
        _require_file(path)
    answerer, _ = load_answerer(checkpoint, max_new_tokens=max_new_tokens, trust_remote_code=trust_remote_code)
    conversation = Conversation(answerer, images)
    if prompt is not None:
        conversation.say(prompt, temperature=temperature, stream=sys.stdout)
        return
    print(HELP, file=sys.stderr)
    with _line_editing():
        for line in _lines():
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                conversation.reset()
            elif command == "/image":
                try:
                    conversation.add_image(Path(argument.strip()))
                except DataError as error:
                    print(f"error: {error}", file=sys.stderr)
            elif command.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                conversation.say(line, temperature=temperature, stream=sys.stdout)


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


@contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and history where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    yield


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"--image {path}: no such file.")
