"""A set to review, made from the digits world, and a server on it."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlit.data.record import Record, Region, write_records
from vlit.serve.review.command import open_server
from vlit.serve.review.server import ReviewServer
from vlit.synth.digits.world import ensure_world
from vlit.synth.quality.annotations import read_annotations
from vlit.types import Turn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("review") / "world"
    ensure_world(root, train_images=8, validation_images=5, test_images=5, questions_per_kind=2, progress=False)
    return root


@pytest.fixture
def dataset(world: Path, tmp_path: Path) -> Path:
    """Eight records of the digits world with regions; images lie beside."""
    shutil.copytree(world / "images" / "train", tmp_path / "images" / "train")
    known = read_annotations([f"train/={world / 'annotations' / 'instances_train.json'}"])
    assert known is not None
    records = []
    for number, (image, things) in enumerate(sorted(known.things.items())):
        regions = tuple(Region(f"{thing.colour} {thing.label}", thing.box) for thing in things)
        turns = (Turn("user", "<image>\nHow many digits are there?"), Turn("assistant", f"There are {len(things)}."))
        kind = "count" if number % 2 else "number"
        records.append(Record(f"r{number}", turns, (image,), domain="digits", instruction_type=kind, regions=regions))
    write_records(tmp_path / "data.jsonl", records)
    return tmp_path / "data.jsonl"


@contextmanager
def serving(dataset: Path, **options: Any) -> Iterator[ReviewServer]:
    server = open_server(dataset, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.log.close()


def call(server: ReviewServer, path: str, body: Any = None, **headers: str | None) -> tuple[int, Any]:
    """Status and JSON of one request with all the right headers, unless others are given (None: left out)."""
    port = server.server_address[1]
    sent = {"Host": f"127.0.0.1:{port}", "X-Review-Token": server.token, "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.putrequest("GET" if data is None else "POST", path, skip_host=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    if data is not None and "Content-Length" not in sent:
        connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content
