"""A chat endpoint on 127.0.0.1 that speaks OpenAI's protocol, misbehaves, and keeps its own accounts.

Not a mock: the engine reaches it through sockets as it would any endpoint. What it charges and how often it delivered each
request is counted here, independent of what the client believes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

FAULTS = ("429", "500", "slow", "cut_json", "cut_body", "twice", "refusal", "wrong_format", "echo_key")
TALK = "Question:\nWhat is shown?\n===\nAnswer:\nThe image shows {}.\n===\nQuestion:\nIs it red?\n===\nAnswer:\nYes, it is."

TAGGED = {
    "judgement": "<Q1>Is there a square?</Q1><A1>Yes, there is.</A1>",
    "choice": "<Q1>Which shape is it?</Q1><C1>A. circle B. square C. star D. line</C1><A1>B. square</A1>",
    "short": "<Q1>Which shape is it?</Q1><A1>A square.</A1>",
    "long": "<Q1>What is shown?</Q1><A1>A square fills the whole picture from side to side.</A1>",
}
"""Answers in numbered tags by the type that a prompt asks for."""


def talk(asked: dict[str, Any], key: str) -> str:
    """An answer in the form that the prompt asks for."""
    system = str(asked["messages"][0]["content"])
    if system.startswith("You check answers"):
        return verdicts(asked["messages"][-1]["content"])
    for kind, text in TAGGED.items():
        if f'of the type "{kind}"' in system:
            return text
    if len(asked["messages"]) == 1 or isinstance(asked["messages"][-1]["content"], list):
        return f"A square fills the picture. It is thing {key[:6]}."
    return TALK.format(f"thing {key[:6]}")


def verdicts(content: Any) -> str:
    """A judge for whom every answer that says "blue" is wrong."""
    text = content if isinstance(content, str) else next(p["text"] for p in content if p["type"] == "text")
    answers = [line.split("Answer:", 1)[1] for line in text.splitlines() if "Answer:" in line]
    wrong = "wrong - nothing blue is to be seen"
    return "\n".join(f"{n}: {wrong if 'blue' in answer else 'right'}" for n, answer in enumerate(answers, 1))


@dataclass
class Accounts:
    """What the server did. ``good`` counts whole usable answers by request key."""

    usd_per_million_in: float = 1.0
    usd_per_million_out: float = 4.0
    requests: int = 0
    charged_nano: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    most_at_once: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    good: Counter[str] = field(default_factory=Counter)
    charged: Counter[str] = field(default_factory=Counter)
    """How often each request key was paid for."""
    seen: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorization: set[str] = field(default_factory=set)
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, *, faults: dict[str, float] | None = None, delay_s: float = 0.0, slow_s: float = 1.0, keep: bool = False,
        honours_keys: bool = False,
    ):  # fmt: skip
        super().__init__(("127.0.0.1", 0), Handler)
        self.honours_keys = honours_keys
        self.answered: dict[str, tuple[bytes, bytes]] = {}
        """(request, answer) by Idempotency-Key; a repeated request gets the same answer and is not charged again."""
        self.faults, self.delay_s, self.slow_s, self.keep = faults or {}, delay_s, slow_s, keep
        self.fixed: tuple[int, bytes, dict[str, str]] | None = None
        """(status, body, headers) of every answer, in place of a good one."""
        self.accounts = Accounts()
        self.key = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""

    def fault(self, key: str, attempt: int) -> str:
        """Faults of the content belong to the request; faults of the transport to the attempt."""
        content = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10_000 / 10_000
        for name in ("refusal", "wrong_format"):
            content -= self.faults.get(name, 0.0)
            if content < 0:
                return name
        draw = Random(f"{key}:{attempt}").random()
        for name, share in self.faults.items():
            if name in ("refusal", "wrong_format"):
                continue
            draw -= share
            if draw < 0:
                return name
        return ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        accounts, server = self.server.accounts, self.server
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(raw)
        key = self.headers.get("Idempotency-Key") or hashlib.sha256(raw).hexdigest()
        with accounts.lock:
            accounts.requests += 1
            accounts.seen[key] += 1
            attempt = accounts.seen[key]
            accounts.now += 1
            accounts.most_at_once = max(accounts.most_at_once, accounts.now)
            accounts.times.append(time.monotonic())
            accounts.authorization.add(self.headers.get("Authorization", ""))
            if server.keep:
                accounts.bodies.append(asked)
        try:
            self.answer(asked, key, server.fault(key, attempt), raw)
        finally:
            with accounts.lock:
                accounts.now -= 1

    def answer(self, asked: dict[str, Any], key: str, fault: str, raw: bytes) -> None:
        accounts, server = self.server.accounts, self.server
        if server.fixed is not None:
            self.reply(*server.fixed)
            return
        with accounts.lock:
            accounts.statuses[fault or "ok"] += 1
        time.sleep(server.delay_s * Random(key).uniform(0.3, 1.7))
        if fault in ("429", "500", "echo_key"):
            headers = {"Retry-After": "0.05"} if fault == "429" else {}
            word = f" with {self.headers.get('Authorization')}" if fault == "echo_key" else ""
            error = json.dumps({"error": {"message": f"try again{word}", "code": fault}}).encode()
            self.reply(429 if fault == "429" else 500, error, headers)
            return
        tokens_in = max(1, sum(len(str(m["content"])) for m in asked["messages"]) // 4)
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens") or 100
        tokens_out = Random(key).randint(limit // 4, limit)
        nano = tokens_in * accounts.usd_per_million_in * 1000 + tokens_out * accounts.usd_per_million_out * 1000
        request, known = server.answered.get(key, (raw, b"")) if server.honours_keys else (raw, b"")
        if request != raw:
            self.reply(409, b'{"error": {"message": "this Idempotency-Key came with another request"}}')
            return
        with accounts.lock:  # charged when the answer is made, whether it arrives or not
            if not known:
                accounts.charged[key] += 1
                accounts.charged_nano += round(nano)
                accounts.tokens_in += tokens_in
                accounts.tokens_out += tokens_out
        message: dict[str, Any] = {"role": "assistant", "content": talk(asked, key)}
        if fault == "refusal":
            message |= {"content": None, "refusal": "I would rather not describe this."}
        elif fault == "wrong_format":
            message["content"] = "Here is a poem about the picture instead."
        body = json.dumps(
            {
                "id": f"chat-{key[:12]}",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out},
            }
        ).encode()
        server.answered[key] = (raw, body)
        if fault == "slow":
            time.sleep(server.slow_s)
        if fault == "cut_json":
            self.reply(200, body[: len(body) // 2])
        elif fault == "cut_body":
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            if fault != "slow":  # the client has given up on a slow one
                with accounts.lock:
                    accounts.good[key] += 1
            self.reply(200, body * 2 if fault == "twice" else body)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Server]:
    """A server in threads of this process."""
    server = Server(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
