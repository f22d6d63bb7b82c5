"""Replies that no endpoint should send: none ends the run with a traceback, and the next run goes on."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.spoilt_pictures import png
from tests.teacher_server import Server, running
from vlit.synth.engine.calls import CallLog
from vlit.synth.engine.client import Client, Unanswered
from vlit.synth.engine.parse import Rejected, read_pairs
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.report import Report
from vlit.synth.engine.settings import read_settings
from vlit.synth.engine.teacher import Ask, Message, Reply
from vlit.synth.teachers.openai import OpenAIConfig, retry_after

WORDS = "A wide blue field lies beside a long road."
CAP = 1.0


def body(content: Any = WORDS, **more: Any) -> str:
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}], "usage": usage} | more)


def counted(tokens_in: Any, tokens_out: Any = 20) -> str:
    return body(usage={"prompt_tokens": tokens_in, "completion_tokens": tokens_out})


def failed(**more: Any) -> str:
    return json.dumps({"error": {"message": "Provider is overloaded \ud83d", "code": 502}} | more)


USED = {
    "half a surrogate pair": body(f"A smile \ud83d shows. {WORDS}"),
    "usage is a list": body(usage=[1, 2]),
    "usage is text": body(usage="none"),
    "usage is null": body(usage=None),
    "count of 2^64": counted(2**64),
    "count of 10^25": counted(10**25),
    "count below 0": counted(-1),
    "count that is text": counted("100"),
    "no error": body(error=None),
}
"""Bodies with an answer that can be used."""
BROKEN = {
    "nested 100,000 deep": '{"choices":' + "[" * 100_000 + "]" * 100_000 + "}",
    "count of 5,000 digits": body().replace("100", "1" * 5000),
    "message is text": json.dumps({"choices": [{"message": "x"}]}),
    "choices is an object": json.dumps({"choices": {"a": 1}}),
    "no object": "[]",
    "content is a number": body(7),
}
"""Bodies without one, which may have been charged."""
FAILED = {
    "error": failed(),
    "error without choices": failed(choices=[]),
    "error as text": json.dumps({"error": "Provider is overloaded"}),
    "error that charges nothing": failed(usage=None),
    "error that charges": failed(usage={"prompt_tokens": 100, "completion_tokens": 0}),
}
"""Bodies that say with HTTP 200 that the request failed."""


def described(server: Server, folder: Path) -> Report:
    teacher = {"type": "openai", "base_url": server.url, "model": "m", "usd_per_million_in": 1, "usd_per_million_out": 4,
               "retries": 1, "backoff_s": 0.01}  # fmt: skip
    raw = {"recipe": {"type": "minigpt4", "min_tokens": 0}, "images": str(folder / "mypics"), "out": str(folder / "out"),
           "teacher": teacher, "budget_usd": CAP}  # fmt: skip
    return run(read_settings(None, raw), show=False)


@pytest.mark.parametrize("case", [*USED, *BROKEN, *FAILED])
def test_a_run_survives_any_reply_and_the_next_run_gets_its_record(tmp_path: Path, case: str) -> None:
    png(tmp_path / "mypics" / "a.png")
    with running() as server:
        server.fixed = (200, (USED | BROKEN | FAILED)[case].encode(), {})
        first = described(server, tmp_path)
        server.fixed = None
        second = described(server, tmp_path)
    assert (first.records, first.unanswered) == ((1, 0) if case in USED else (None, 1))
    assert (second.records, second.unanswered) == (1, 0)
    assert 0 < second.totals.spent == second.totals.committed < CAP * 1e9
    (record,) = (tmp_path / "out" / "dataset.jsonl").read_text(encoding="utf-8").splitlines()
    answer = json.loads(record)["conversations"][1]["value"]
    assert ("\ufffd" in answer) == (case == "half a surrogate pair")
    if case in FAILED:
        ((reason, count),) = first.stages[0].failures.items()
        assert count == 1
        assert "2 attempts: HTTP 200: Provider is overloaded" in reason
    assert (first.totals.spent > 0) == (case not in FAILED or case == "error that charges")


def test_usage_that_cannot_be_true_is_charged_with_the_worst_case(tmp_path: Path) -> None:
    spent = {}
    for case in ("no error", "count of 10^25", "usage is a list"):
        png(tmp_path / case / "mypics" / "a.png")
        with running() as server:
            server.fixed = (200, USED[case].encode(), {})
            spent[case] = described(server, tmp_path / case).totals.spent
    assert spent["no error"] == 2 * (100 * 1000 + 20 * 4000)  # caption and refine, by the endpoint's own count
    assert spent["count of 10^25"] == spent["usage is a list"] > 2 * 512 * 4000  # max_tokens of each, and the prompts


@pytest.mark.parametrize(
    "date",
    [
        "Mon, 30 Nov 0000 01:00:00 GMT",
        "Mon, 30 Nov 2026 01:00:00 +999999999999999",
        "Mon, 30 Nov 2026 99999999999999999999:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 -2359",
    ],
)
def test_an_impossible_date_to_retry_after_is_no_date(date: str) -> None:
    assert retry_after(date) in (None, 0, 3600)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"pairs": ' + "1" * 5000 + "}", '[{"question": "a", "answer": "b", "options": 3}]']
)
def test_json_that_is_no_list_of_pairs_is_rejected(text: str) -> None:
    with pytest.raises(Rejected, match="format"):
        read_pairs(Reply(text))


def test_half_a_surrogate_pair_within_json_can_be_stored() -> None:
    (pair,) = read_pairs(Reply('[{"question": "a\\ud83d?", "answer": "\\ud83d\\ude00 b"}]'))
    assert (pair.question, pair.answer) == ("a\ufffd?", "\U0001f600 b")


def test_requests_that_were_told_to_wait_an_hour_are_given_up_when_the_run_stops(tmp_path: Path) -> None:
    """As after ctrl-c, a refused key, or an exhausted budget."""
    with running() as server:
        server.fixed = (429, b"{}", {"Retry-After": "3600"})
        log = CallLog(tmp_path / "calls.jsonl")
        teacher = OpenAIConfig(base_url=server.url, model="m", backoff_s=0.01, concurrency=2, usd_per_million_out=1)
        asking = Client(teacher.build(), log)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(asking.ask, Ask("talk", (Message("user", str(n)),), 50)) for n in range(3)]
            while log.totals.failures < 1:
                time.sleep(0.01)
            time.sleep(0.2)
            asking.stopped.set()
            started = time.monotonic()
            for future in waiting:
                assert isinstance(future.exception(timeout=5), Unanswered)
        assert time.monotonic() - started < 2
        assert server.accounts.most_at_once <= 2
        assert log.totals.committed == 0
        log.close()
