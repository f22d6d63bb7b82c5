"""What a teacher is: something that answers an :class:`Ask` with text, at a price and under limits.

A teacher is used in two steps, so that a reply is on the disk before anybody parses it: ``send`` returns the body as it
came, ``read`` turns a body into a :class:`Reply` and is a pure function. :class:`~vlit.synth.engine.client.Client` stands
between recipes and teachers and adds the cache, the budget, the pace and the retries.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlit.data.images import open_rgb
from vlit.durable import file_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

BYTES_PER_TOKEN = 4.0
"""English text, about; for estimates only. Reservations count one token a byte, which no tokenizer of bytes exceeds."""
TOKENS_PER_MESSAGE = 16
"""Bound of what a chat template adds to a message."""
BEHIND = (122, 116, 104)
"""Colour behind transparent parts of pictures: CLIP's mean."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a prompt; ``images`` are files."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    ``task`` and ``facts`` say in data what the messages say in words; only the embedded teacher reads them. ``schema`` is
    the JSON schema of the answer where the prompt allows JSON. ``sample`` numbers the draws: the same prompt with another
    number is another request.
    """

    task: str
    messages: tuple[Message, ...]
    max_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] | None = None
    sample: int = 0

    def draw(self, sample: int) -> Ask:
        """The same request, asked again."""
        return replace(self, sample=sample)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a body says. ``refused``: why there is no answer (the teacher declined, or a filter stopped it).

    Token counts are None where the endpoint does not report them; the worst case is charged then.
    """

    text: str
    tokens_in: int | None = 0
    tokens_out: int | None = 0
    refused: str = ""
    cut: bool = False
    """The answer ended at its token limit."""


class BrokenReply(Exception):
    """A body that is not a reply: cut off, not JSON, without choices."""


class SendFailed(Exception):
    """A request without a usable reply.

    Attributes:
        again: whether asking again can help.
        wait_s: what the endpoint asked to wait, seconds.
        charged: whether the endpoint may have charged for it.
        pause_all: the endpoint asks every request to wait, not just this one.
    """

    def __init__(
        self, reason: str, *, again: bool, charged: bool, wait_s: float | None = None, pause_all: bool = False
    ) -> None:
        super().__init__(reason)
        self.again, self.charged, self.wait_s, self.pause_all = again, charged, wait_s, pause_all


class Declined(Exception):
    """The endpoint says that this one request is not answered, whoever asks (content filter, too long)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How a teacher may be used."""

    concurrency: int = 1
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    retries: int = 0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    nano_per_token_in: float = 0.0
    """Nano-dollars; dollars for a million tokens times 1,000."""
    nano_per_token_out: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> int:
        """Whole nano-dollars, rounded up."""
        return math.ceil(tokens_in * self.nano_per_token_in) + math.ceil(tokens_out * self.nano_per_token_out)


class Teacher:
    """Base of all teachers."""

    limits = Limits()
    image_tokens = 0
    """Bound of the tokens an image costs."""
    is_remote = False
    """Whether answers come from somebody else's machine; a run asks before it begins."""

    def identity(self) -> dict[str, Any]:
        """All that decides an answer, beside the request."""
        raise NotImplementedError(f"{type(self).__name__} must implement identity")

    def send(self, ask: Ask) -> str:
        """The body of the reply, as it came. Raises SendFailed or Declined."""
        raise NotImplementedError(f"{type(self).__name__} must implement send")

    def ready(self, ask: Ask) -> Callable[[], str]:
        """What sends this request, any number of times; its pictures are read here, before anything is reserved for it.

        Raises:
            DataError: a picture cannot be decoded.
        """
        return partial(self.send, ask)

    def read(self, body: str) -> Reply:
        """What a body says; pure. Raises BrokenReply."""
        return Reply(body)

    def known_domains(self) -> set[str] | None:
        """The domains it can answer in; None: all."""
        return None

    def key(self, ask: Ask) -> str:
        """Address of a request's reply: a hash of the teacher's identity and all that is asked, pictures by content."""
        said = [[m.role, m.text, [picture_hash(i) for i in m.images]] for m in ask.messages]
        content = {"teacher": self.identity(), "messages": said, "max_tokens": ask.max_tokens, "schema": ask.schema}
        return content_hash(content | {"sample": ask.sample})

    def most_tokens_in(self, ask: Ask) -> int:
        """Upper bound of the tokens of a request: one a byte, one message mark, the bound of each image."""
        texts = [m.text for m in ask.messages] + ([json.dumps(ask.schema)] if ask.schema else [])
        images = sum(len(m.images) for m in ask.messages)
        size = sum(len(text.encode()) for text in texts)
        return size + TOKENS_PER_MESSAGE * (len(ask.messages) + 1) + self.image_tokens * images

    def likely_tokens_in(self, ask: Ask) -> int:
        """Expected tokens of a request, for estimates."""
        images = sum(len(m.images) for m in ask.messages)
        size = sum(len(m.text.encode()) for m in ask.messages)
        return round(size / BYTES_PER_TOKEN) + 4 * (len(ask.messages) + 1) + self.image_tokens * images


def content_hash(content: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def mended(text: str) -> str:
    """Text that can be stored: a lone half of a surrogate pair, as JSON's ``\\ud83d`` can leave one, becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def picture_hash(path: str) -> str:
    """SHA-256 of a picture file; remembered while size and time of change stay the same."""
    stat = Path(path).stat()
    return _picture_hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _picture_hash(path: str, size: int, changed_ns: int) -> str:
    return file_sha256(Path(path))


def open_picture(path: str, *, longest_side: int | None = None) -> Image:
    """An upright RGB picture; with ``longest_side``, in at most so many pixels a side.

    Raises:
        DataError: the file is missing, not an image, damaged, or too large.
    """
    if longest_side is None:
        return open_rgb(Path(path), background=BEHIND)
    shown = open_rgb(Path(path), background=BEHIND, at_least=2 * longest_side, side="long")
    shown.thumbnail((longest_side, longest_side))
    return shown
