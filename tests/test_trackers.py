"""What trackers were told is what their own libraries read back."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlit.errors import ConfigError
from vlit.registry import TRACKERS
from vlit.train.tracker import flatten, scalars
from vlit.train.trackers.wandb import choose_mode

ROWS = [
    {
        "stage": "align",
        "step": 1,
        "loss": 4.5,
        "loss_by_source": {"coco": 4.0, "vg": 5.0},
        "note": "text stays in JSONL",
    },
    {"stage": "align", "step": 2, "loss": 3.5, "loss_by_source": {"coco": 3.0, "vg": 4.0}},
    {"stage": "instruct", "step": 1, "loss": 1.25, "tokens": 512},
]
WANTED = {
    "align/loss": [(1, 4.5), (2, 3.5)],
    "align/loss_by_source/coco": [(1, 4.0), (2, 3.0)],
    "align/loss_by_source/vg": [(1, 5.0), (2, 4.0)],
    "instruct/loss": [(1, 1.25)],
    "instruct/tokens": [(1, 512.0)],
}


def test_nested_rows_become_flat_names():
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": [3]}) == {"a/b/c": 1, "a/d": 2, "e": [3]}


def test_steps_of_two_stages_cannot_collide():
    assert scalars({"stage": "align", "step": 7, "loss": 1, "text": "x"}) == ({"align/loss": 1.0}, 7)
    assert scalars({"step": 7, "loss": 1})[0] == {"loss": 1.0}


def test_tensorboard_reads_back_what_was_logged_across_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rows in (ROWS[:1], ROWS[1:]):
        tracker = TRACKERS.get("tensorboard").model_validate({"type": "tensorboard"}).build()
        tracker.start(tmp_path, {"seed": 1, "model": {"connector": "mlp"}})
        for row in rows:
            tracker.log(row)
        tracker.finish()
        tracker.finish()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    held = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert held == WANTED


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a ``.wandb`` file: LevelDB's log format (32 KiB blocks of crc, length, type, data) after a header."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def test_wandb_offline_writes_what_was_logged_and_keeps_the_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = TRACKERS.get("wandb").model_validate({"project": "test"}).build()
    tracker.start(tmp_path, {"seed": 1})
    for row in ROWS:
        tracker.log(row)
    tracker.finish()
    run_id = (tmp_path / "wandb_run_id").read_text()
    (file,) = tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    records: list[wandb_internal_pb2.Record] = []
    give_up = time.monotonic() + 60
    while not (records and records[-1].WhichOneof("record_type") == "exit"):  # its own process writes the file
        assert time.monotonic() < give_up, "wandb did not finish writing within 60 s"
        time.sleep(0.05)
        records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(file.read_bytes())]
    held: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            values = {"/".join(item.nested_key) or item.key: float(item.value_json) for item in record.history.item}
            steps = {name.split("/")[0]: int(value) for name, value in values.items() if name.endswith("/step")}
            for name, value in values.items():
                if not name.startswith("_") and not name.endswith("/step"):
                    held.setdefault(name, []).append((steps[name.split("/")[0]], value))
    assert held == WANTED


def test_wandb_goes_offline_by_itself_and_online_refuses_without_a_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert choose_mode("auto") == "offline"
    with pytest.raises(ConfigError, match="needs an API key"):
        choose_mode("online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert choose_mode("auto") == "offline"
    with pytest.raises(ConfigError, match=f"a connection to 127.0.0.1:{port}"):
        choose_mode("online")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert choose_mode("auto") == "online"
        assert choose_mode("offline") == "offline"
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert choose_mode("auto") == "offline"
