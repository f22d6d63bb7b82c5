"""Any endpoint that speaks OpenAI's chat completions: hosted services, vLLM, llama.cpp, SGLang, Ollama.

https://platform.openai.com/docs/api-reference/chat/create. Nothing is contacted unless ``base_url`` and ``model`` are
configured. The key is read from the environment variable that ``key_env`` names, sent to ``base_url`` alone (redirects are not
followed), and cut out of every text that is stored or shown.
"""

from __future__ import annotations

import base64
import email.utils
import io
import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from vlit.config.component import ComponentConfig
from vlit.errors import ConfigError
from vlit.registry import TEACHERS
from vlit.synth.engine.teacher import (
    Ask,
    BrokenReply,
    Declined,
    Limits,
    Message,
    Reply,
    SendFailed,
    Teacher,
    mended,
    open_picture,
)

Positive = Annotated[float, Field(gt=0)]
Price = Annotated[float, Field(ge=0)]
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
DECLINED_CODES = ("content_filter", "content_policy_violation", "context_length_exceeded", "invalid_prompt")
MAX_ERROR = 300
MAX_WAIT_S = 3600.0
MAX_TOKENS = 10**9
"""More tokens than any request has; a larger count is nonsense and counts as none."""


@TEACHERS.register("openai")
class OpenAIConfig(ComponentConfig):
    """An OpenAI-compatible chat endpoint, for text or pictures."""

    type: str = "openai"
    base_url: str
    """Address up to and with `/v1`, for example `http://localhost:8000/v1`. There is no default."""
    model: str
    """Name of the model at the endpoint."""
    key_env: str = ""
    """Environment variable that holds the key; empty: no key is sent."""
    usd_per_million_in: Price = 0.0
    """Price of a million input tokens, dollars."""
    usd_per_million_out: Price = 0.0
    """Price of a million output tokens, dollars."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests in flight at most; also the bound of replies that a kill can lose."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    retries: Annotated[int, Field(ge=0)] = 6
    """Further attempts after 429, 5xx, timeouts and broken replies."""
    backoff_s: Positive = 1.0
    """Wait before the second attempt, doubled each time, with jitter; a longer Retry-After is honoured."""
    max_backoff_s: Positive = 60.0
    timeout_s: Positive = 120.0
    """For a whole request, seconds. A request that times out counts with its worst-case cost, since it may be charged."""
    temperature: float | None = 0.7
    """null: not sent (some models take none)."""
    top_p: float | None = None
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the field that bounds the output; newer OpenAI models want the second."""
    structured: Literal["off", "json_schema"] = "off"
    """`json_schema`: ask for structured output where a prompt allows it (the endpoint must offer it)."""
    image_tokens: Annotated[int, Field(ge=0)] = 1700
    """Most tokens one image is charged with."""
    max_image_side: Annotated[int, Field(ge=16)] = 512
    """Pictures are sent as JPEG with sides of at most so many pixels (MMInstruct: 512)."""
    image_detail: Literal["low", "high", "auto"] = "low"

    def build(self, **kwargs: Any) -> OpenAITeacher:
        """The teacher. ConfigError: no key in the environment, or an address a key must not be sent to."""
        import httpx

        try:
            parts = urlsplit(self.base_url)
            _ = parts.port, httpx.URL(self.base_url)  # each refuses what the other lets pass
        except (ValueError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"teacher.base_url: no address ({error}). Give one like http://localhost:8000/v1."
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(
                f"teacher.base_url: {parts.scheme}://{parts.hostname or ''}: expected http(s)://host/v1 without user or query."
            )
        key = ""
        if self.key_env:
            key = os.environ.get(self.key_env, "").strip()
            if not key:
                raise ConfigError(
                    f"teacher.key_env: the environment variable {self.key_env} is not set. Export the key there."
                )
            if not key.isascii() or not key.isprintable() or len(key) < 8:
                raise ConfigError(
                    f"teacher.key_env: {self.key_env} does not hold a key (8 printable characters or more)."
                )
            if parts.scheme == "http" and parts.hostname not in LOOPBACK:
                raise ConfigError(
                    f"teacher.base_url: a key is not sent over plain http to {parts.hostname}. Use https."
                )
        return OpenAITeacher(self, key)


class OpenAITeacher(Teacher):
    """Sends with httpx; one connection pool for all threads."""

    is_remote = True

    def __init__(self, config: OpenAIConfig, key: str) -> None:
        import httpx

        self.config, self._key = config, key
        self.image_tokens = config.image_tokens
        self.limits = Limits(
            concurrency=config.concurrency,
            requests_per_minute=config.requests_per_minute,
            tokens_per_minute=config.tokens_per_minute,
            retries=config.retries,
            backoff_s=config.backoff_s,
            max_backoff_s=config.max_backoff_s,
            nano_per_token_in=config.usd_per_million_in * 1000,
            nano_per_token_out=config.usd_per_million_out * 1000,
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        pool = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._http = httpx.Client(timeout=config.timeout_s, limits=pool, headers=headers, follow_redirects=False)
        self._url = config.base_url.rstrip("/") + "/chat/completions"

    def identity(self) -> dict[str, Any]:
        names = ("base_url", "model", "temperature", "top_p", "structured", "max_image_side", "image_detail")
        return {"type": "openai"} | {name: getattr(self.config, name) for name in names}

    def payload(self, ask: Ask) -> dict[str, Any]:
        """The request as JSON. DataError: a picture cannot be decoded."""
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": m.role, "content": self._content(m)} for m in ask.messages],
            config.token_limit_key: ask.max_tokens,
        }
        body |= {n: v for n in ("temperature", "top_p") if (v := getattr(config, n)) is not None}
        if ask.schema is not None and config.structured == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": ask.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _content(self, message: Message) -> Any:
        if not message.images:
            return message.text
        parts: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
        for path in message.images:
            url = f"data:image/jpeg;base64,{_jpeg(path, self.config.max_image_side)}"
            parts.append({"type": "image_url", "image_url": {"url": url, "detail": self.config.image_detail}})
        return parts

    def send(self, ask: Ask) -> str:
        return self.ready(ask)()

    def ready(self, ask: Ask) -> Callable[[], str]:
        return partial(self._post, self.payload(ask), self.key(ask))

    def _post(self, payload: dict[str, Any], key: str) -> str:
        import httpx

        named = {"Idempotency-Key": key}  # an endpoint that knows it charges a repeated request once
        deadline = _Deadline(self.config.timeout_s)
        try:
            with self._http.stream("POST", self._url, json=payload, headers=named) as answer:
                chunks = []
                for chunk in answer.iter_bytes():
                    chunks.append(chunk)
                    deadline.check()
                text = self.clean(b"".join(chunks).decode("utf-8", "replace"))
                status, headers = answer.status_code, answer.headers
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise SendFailed(self.clean(f"{type(error).__name__}: {error}"), again=True, charged=False) from None
        except (httpx.HTTPError, TimeoutError) as error:  # it had left: the endpoint may have charged it
            raise SendFailed(self.clean(f"{type(error).__name__}: {error}"), again=True, charged=True) from None
        failed = _failure(text) if status == 200 else {}
        if failed is None:
            return text
        reason = f"HTTP {status}: {_error_text(text)}"
        if status == 200:  # gateways report a failure behind them so; what they charge for it stands in its usage
            charged = bool(failed.get("usage"))
            raise SendFailed(reason, again=True, charged=charged, wait_s=retry_after(headers.get("retry-after")))
        if status == 429 or status == 408 or status == 409 or status >= 500:
            wait_s = retry_after(headers.get("retry-after"))
            raise SendFailed(reason, again=True, charged=False, wait_s=wait_s, pause_all=status == 429)
        if any(code in text for code in DECLINED_CODES):
            raise Declined(reason)
        if status in (401, 403, 404) or status in range(300, 400):
            raise ConfigError(f"teacher at {self.config.base_url}: {reason}. Check base_url, model and key_env.")
        raise SendFailed(reason, again=False, charged=False)

    def read(self, body: str) -> Reply:
        data = _one_object(body)
        try:
            choice = data["choices"][0]
            message, usage = choice["message"], data.get("usage")
            text, refusal = message.get("content") or "", message.get("refusal") or ""
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise BrokenReply(f"no choices[0].message ({type(error).__name__}: {error})") from error
        if not isinstance(text, str):
            raise BrokenReply(f"content is {type(text).__name__}, expected a string")
        reason = choice.get("finish_reason")
        tokens_in, tokens_out = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        refused = mended(str(refusal)) or (
            "stopped by the endpoint's content filter" if reason == "content_filter" else ""
        )
        return Reply(mended(text), tokens_in, tokens_out, refused, cut=reason == "length")

    def clean(self, text: str) -> str:
        """``text`` without the key."""
        return text.replace(self._key, "***") if self._key else text


class _Deadline:
    """httpx bounds each read, not the whole: a server that drips a byte a minute would never time out."""

    def __init__(self, seconds: float) -> None:
        self._end, self._seconds = time.monotonic() + seconds, seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise TimeoutError(f"no complete reply in {self._seconds:g} s")


def retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or an HTTP date; at most an hour."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return None
    return min(max(seconds, 0.0), MAX_WAIT_S) if seconds == seconds else None


def _one_object(body: str) -> dict[str, Any]:
    """The JSON object of a body. The same object twice, as some proxies deliver it, is that object."""
    try:
        data, end = json.JSONDecoder().raw_decode(body.strip())
        rest = body.strip()[end:].strip()
        while rest:
            again, end = json.JSONDecoder().raw_decode(rest)
            if again != data:
                raise BrokenReply("two different objects in one body")
            rest = rest[end:].strip()
    except (ValueError, RecursionError) as error:
        raise BrokenReply(f"not JSON ({error})") from error
    if not isinstance(data, dict):
        raise BrokenReply(f"{type(data).__name__} instead of an object")
    return data


def _count(usage: Any, name: str) -> int | None:
    """A count of tokens; None where the endpoint gives none that can be true."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 <= count <= MAX_TOKENS else None


def _failure(body: str) -> dict[str, Any] | None:
    """The object of a body that holds an error in place of an answer."""
    try:
        data = _one_object(body) if '"error"' in body else {}
    except BrokenReply:
        return None
    return data if data.get("error") and not data.get("choices") else None


def _error_text(text: str) -> str:
    try:
        error = _one_object(text)["error"]
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (BrokenReply, KeyError):
        pass
    flat = " ".join(mended(text).split())
    return flat if len(flat) <= MAX_ERROR else flat[:MAX_ERROR] + "…"


_DECODING = threading.Semaphore(4)
"""Pictures in memory at once, whatever the number of requests in flight."""


def _jpeg(path: str, longest_side: int) -> str:
    file = io.BytesIO()
    with _DECODING:
        open_picture(path, longest_side=longest_side).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()
