"""The data engine against a real endpoint that misbehaves: retries, budget, cache, kills, secrecy of the key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.teacher_server import Server, running
from vlit.errors import ConfigError, SynthError
from vlit.synth.engine.calls import BudgetExhausted, CallLog
from vlit.synth.engine.client import Client, Pace, Unanswered
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.settings import SynthConfig, read_settings
from vlit.synth.engine.teacher import Ask, Message
from vlit.synth.teachers.openai import OpenAIConfig, retry_after

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789abcdef"
CONCURRENCY = 8
NANO = 1_000_000_000
PRICES = {"usd_per_million_in": 1.0, "usd_per_million_out": 4.0}
FAULTS = {
    "429": 0.05, "500": 0.05, "slow": 0.01, "cut_json": 0.02, "cut_body": 0.02, "twice": 0.02, "echo_key": 0.02,
    "refusal": 0.15, "wrong_format": 0.15,
}  # fmt: skip


def coco(folder: Path, pictures: int) -> dict[str, Any]:
    """COCO files of ``pictures`` tiny pictures with one box and one caption each."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows = [{"id": n, "file_name": f"{n:04d}.png", "width": 4, "height": 4} for n in range(pictures)]
    Image.new("RGB", (4, 4), "red").save(images / "0000.png")
    for row in rows[1:]:
        (images / row["file_name"]).write_bytes((images / "0000.png").read_bytes())
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 0} for n in range(pictures)]
    instances = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
    texts = [{"id": n, "image_id": n, "caption": f"Red square number {n}."} for n in range(pictures)]
    (folder / "instances_x.json").write_text(json.dumps(instances))
    (folder / "captions_x.json").write_text(json.dumps({"images": rows, "annotations": texts}))
    return {"annotations": [str(folder / "instances_x.json"), str(folder / "captions_x.json")], "images": str(images)}


def settings(server: Server, given: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    teacher = {
        "type": "openai", "base_url": server.url, "model": "m", "key_env": "VLIT_TEST_KEY", **PRICES, "backoff_s": 0.02,
        "max_backoff_s": 0.2, "timeout_s": 0.8, "retries": 8, "concurrency": CONCURRENCY,
    }  # fmt: skip
    recipe = {"type": "llava", "shares": {"conversation": 1}, "max_tokens": 200}
    return given | {"recipe": recipe, "teacher": teacher | more.pop("teacher", {}), "out": str(out)} | more


def config(raw: dict[str, Any]) -> SynthConfig:
    return read_settings(None, raw)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLIT_TEST_KEY", KEY)


def kill_and_restart(server: Server, path: Path, *, kills: int, seed: int) -> str:
    """Start the command, kill it after a random number of further requests, again and again, then let it finish."""
    rng, said = Random(seed), ""
    command = [sys.executable, "-m", "vlit.cli", "synth", "run", "--config", str(path), "--yes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for round_ in range(kills + 1):
        target = server.accounts.requests + rng.randint(20, 110)
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if round_ < kills:
            while server.accounts.requests < target and child.poll() is None:
                time.sleep(0.002)
            assert child.poll() is None, "finished before it could be killed"
            child.send_signal(signal.SIGKILL)
        output, _ = child.communicate(timeout=60)
        said += output
        if round_ == kills:
            assert child.returncode == 0, output[-3000:]
        while server.accounts.now:  # requests in flight at the kill
            time.sleep(0.01)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("honours_keys", [True, False], ids=["endpoint with idempotency", "endpoint without"])
def test_killed_five_times_every_record_is_there_once_and_nothing_is_paid_twice(
    tmp_path: Path, honours_keys: bool
) -> None:
    """Where the endpoint knows Idempotency-Key, nothing at all; else at most what was in flight at a kill."""
    kills, cap, out = 5, 1.5, tmp_path / "out"
    with running(faults=FAULTS, delay_s=0.02, slow_s=1.0, honours_keys=honours_keys) as server:
        raw = settings(server, coco(tmp_path / "data", 500), out, budget_usd=cap)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        said = kill_and_restart(server, tmp_path / "run.yaml", kills=kills, seed=3)
        accounts = server.accounts
        data, rejected = rows(out / "dataset.jsonl"), rows(out / "rejected.jsonl")
        ids = [row["id"] for row in data] + [row["id"] for row in rejected]
        assert len(ids) == len(set(ids)) == 500
        assert 400 < len(data) < 500
        assert {row["reason"].split(":")[0] for row in rejected} == {"refused", "format"}
        # money, by the server's own count
        report = json.loads((out / "report.json").read_text())
        assert 0 < accounts.charged_nano <= cap * NANO
        assert accounts.charged_nano <= report["possibly_spent_usd"] * NANO + 1
        repeated = sum(count - 1 for count in accounts.good.values())
        assert 0 < repeated <= kills * CONCURRENCY
        assert (set(accounts.charged.values()) == {1}) == honours_keys
        assert report["requests_without_outcome"] <= kills * CONCURRENCY
        assert accounts.most_at_once <= CONCURRENCY + accounts.statuses["slow"]  # a slow one is still answering nobody
        for fault in FAULTS:
            assert accounts.statuses[fault] > 0, fault
        # nothing is asked again
        before = accounts.requests
        assert run(config(raw), show=False).records == len(data)
        assert accounts.requests == before
        assert accounts.authorization == {f"Bearer {KEY}"}
    texts = [said, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png")]
    assert len(texts) > 5
    assert not any(KEY in text for text in texts)
    assert any("***" in text for text in texts)  # the endpoint did echo it


@pytest.mark.slow
def test_interrupted_with_ctrl_c_what_is_in_flight_is_kept_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(delay_s=0.05) as server:
        raw = settings(server, coco(tmp_path / "data", 150), out)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "vlit.cli", "synth", "run", "--config", str(tmp_path / "run.yaml"), "--yes"]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while server.accounts.requests < 40 and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130, said[-2000:]
        stopped = json.loads((out / "report.json").read_text())
        assert stopped["requests_without_outcome"] == 0
        assert stopped["records"] is None
        assert stopped["replies"] == len(server.accounts.good) < 150
        assert run(config(raw), show=False).records == 150
        assert set(server.accounts.good.values()) == {1}


def test_without_kills_nothing_is_paid_twice_and_cost_and_tokens_are_the_servers(tmp_path: Path) -> None:
    with running(faults={"429": 0.1, "500": 0.1, "twice": 0.1}) as server:
        report = run(config(settings(server, coco(tmp_path / "data", 100), tmp_path / "out")), show=False)
        assert report.records == 100
        assert set(server.accounts.good.values()) == {1}
        assert len(server.accounts.good) == 100
        assert report.totals.spent == server.accounts.charged_nano
        assert (report.totals.tokens_in, report.totals.tokens_out) == (
            server.accounts.tokens_in,
            server.accounts.tokens_out,
        )
        assert report.totals.failures == server.accounts.statuses["429"] + server.accounts.statuses["500"] > 5


def test_the_budget_is_never_exceeded_by_the_servers_count_and_the_run_goes_on_when_it_is_raised(
    tmp_path: Path,
) -> None:
    cap = 0.03
    with running(faults={"slow": 0.02, "cut_json": 0.03, "cut_body": 0.03}, delay_s=0.005) as server:
        raw = settings(
            server, coco(tmp_path / "data", 120), tmp_path / "out", teacher={"concurrency": 16, "timeout_s": 0.3}
        )
        for _ in range(3):
            with pytest.raises(BudgetExhausted, match="Raise budget_usd"):
                run(config(raw | {"budget_usd": cap}), show=False)
            assert server.accounts.charged_nano <= cap * NANO
        assert server.accounts.charged_nano > 0.5 * cap * NANO  # the cap is used, not merely kept
        assert not (tmp_path / "out" / "dataset.jsonl").exists()
        assert run(config(raw | {"budget_usd": 10}), show=False).records == 120
        assert set(server.accounts.good.values()) == {1}


def test_a_budget_needs_prices_and_a_key_needs_its_variable_and_https(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: dict[str, Any] = {"base_url": "http://example.org/v1", "model": "m"}
    with pytest.raises(ConfigError, match="plain http"):
        OpenAIConfig(**base, key_env="VLIT_TEST_KEY").build()
    monkeypatch.delenv("VLIT_TEST_KEY")
    with pytest.raises(ConfigError, match="VLIT_TEST_KEY is not set"):
        OpenAIConfig(**base, key_env="VLIT_TEST_KEY").build()
    with pytest.raises(ConfigError, match="without user"):
        OpenAIConfig(base_url="https://me:secret@example.org/v1", model="m").build()
    raw = {"recipe": "llava", "teacher": {"type": "openai", **base}, "out": str(tmp_path / "o"), "budget_usd": 1}
    with pytest.raises(ConfigError, match="no prices"):
        run(config(raw), show=False)
    with pytest.raises(ConfigError, match="base_url"):
        config({"recipe": "llava", "teacher": "openai", "out": "o"})


def client(server: Server, path: Path, **options: Any) -> Client:
    made: dict[str, Any] = {"base_url": server.url, "model": "m", "backoff_s": 0.01, "retries": 3, **PRICES} | options
    return Client(OpenAIConfig(**made).build(), CallLog(path / "calls.jsonl"))


def ask(text: str, **more: Any) -> Ask:
    return Ask("conversation", (Message("system", "Talk."), Message("user", text)), 50, **more)


def test_the_same_request_from_many_threads_is_sent_once_and_another_draw_is_another_request(tmp_path: Path) -> None:
    with running(delay_s=0.05) as server:
        asking = client(server, tmp_path)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(asking.ask, [ask("same")] * 16))
        assert len({reply.text for reply in replies}) == 1
        assert server.accounts.requests == 1
        asking.ask(ask("same", sample=1))
        assert server.accounts.requests == 2
        asking.log.close()


def test_retries_end_and_an_unanswered_request_is_not_stored(tmp_path: Path) -> None:
    with running(faults={"500": 1.0}) as server:
        asking = client(server, tmp_path)
        with pytest.raises(Unanswered, match="4 attempts: HTTP 500: try again"):
            asking.ask(ask("x"))
        assert server.accounts.requests == 4
        server.faults = {}
        assert "The image shows" in asking.ask(ask("x")).text
        asking.log.close()


def test_many_failures_in_a_row_end_the_run_and_keep_what_is_done(tmp_path: Path) -> None:
    with running(faults={"500": 1.0}) as server:
        raw = settings(server, coco(tmp_path / "data", 60), tmp_path / "out", max_unanswered=5, teacher={"retries": 0})
        with pytest.raises(SynthError, match="5 requests in a row"):
            run(config(raw), show=False)
        assert server.accounts.requests < 60
        server.faults = {}
        assert run(config(raw), show=False).records == 60


def test_a_timeout_counts_with_its_worst_case_since_it_may_have_been_charged(tmp_path: Path) -> None:
    with running(faults={"slow": 1.0}, slow_s=0.5) as server:
        asking = client(server, tmp_path, timeout_s=0.1, retries=0)
        with pytest.raises(Unanswered, match="Timeout"):
            asking.ask(ask("x"))
        assert asking.log.totals.spent >= server.accounts.charged_nano > 0
        asking.log.close()


def test_an_image_travels_as_jpeg_and_structured_output_is_asked_for_where_a_prompt_allows_it(tmp_path: Path) -> None:
    Image.new("RGB", (900, 300), "blue").save(tmp_path / "wide.png")
    with running(keep=True) as server:
        asking = client(server, tmp_path, structured="json_schema")
        message = Message("user", "Look.", (str(tmp_path / "wide.png"),))
        asking.ask(Ask("caption", (message,), 50, schema={"type": "object"}))
        sent = server.accounts.bodies[0]
        asking.log.close()
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}
    text, picture = sent["messages"][0]["content"]
    assert text["text"] == "Look."
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_the_pace_is_kept_and_retry_after_holds_everybody(tmp_path: Path) -> None:
    with running() as server:
        asking = client(server, tmp_path, requests_per_minute=1200, concurrency=8)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(asking.ask, [ask(str(n)) for n in range(12)]))
        gaps = [b - a for a, b in zip(server.accounts.times, server.accounts.times[1:], strict=False)]
        assert server.accounts.times[-1] - server.accounts.times[0] > 11 * 0.05 - 0.04
        assert len(gaps) == 11
        asking.log.close()
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    pace = Pace(60, 6000, clock=lambda: clock[0], sleep=sleep)
    left = []
    for tokens in (100, 300, 100, 100):
        pace.wait(tokens)
        left.append(round(clock[0], 6))
    assert left == [0, 1, 4, 5]  # a request a second, a hundred tokens a second
    pace.hold(10)
    pace.wait(1)
    assert clock[0] == 15


def test_retry_after_is_read_as_seconds_or_date_and_nonsense_is_ignored() -> None:
    assert retry_after("2.5") == 2.5
    assert retry_after("-1") == 0
    assert retry_after("nan") is None
    assert retry_after("soon") is None
    assert retry_after("1e12") == 3600
    assert retry_after(None) is None
    assert 0 <= (retry_after("Wed, 21 Oct 2015 07:28:00 GMT") or 0) <= 1


def test_an_endpoint_that_charges_more_than_its_limit_ends_the_run(tmp_path: Path) -> None:
    with running() as server:
        asking = client(server, tmp_path)
        body = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 10**6, "completion_tokens": 1}}
        asking.log.reserve(1)
        number = asking.log.sent("k", 1)
        asking.log.got(number, "k", json.dumps(body))
        with pytest.raises(SynthError, match="more than its worst case"):
            asking._parse(number, json.dumps(body), worst=1)
        asking.log.close()
