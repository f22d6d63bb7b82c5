"""The review page: driven in a real browser, killed, attacked; its log and its agreement."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlit.cli import main
from vlit.data.record import Record, Region, read_records, write_records
from vlit.errors import ConfigError, DataError
from vlit.serve.review.agreement import agreement_table, cohen_kappa
from vlit.serve.review.command import export_reviews, open_server, url_of
from vlit.serve.review.dataset import Reviewed
from vlit.serve.review.log import DecisionLog
from vlit.serve.review.server import MAX_BODY_BYTES, ReviewServer
from vlit.synth.digits.world import ensure_world
from vlit.synth.quality.annotations import read_annotations
from vlit.types import Turn

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
]  # fmt: skip


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


# --- in a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def start(dataset: Path) -> tuple[subprocess.Popen[str], str]:
    """The command itself, and the address it prints."""
    words = [sys.executable, "-m", "vlit.cli", "synth", "review", str(dataset), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[1]


def wait_for(condition: Callable[[], Any], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.03)


class Page:
    """The review page as a person at the keyboard sees it."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, url: str, row: int) -> None:
        self.browser.get("about:blank")
        self.browser.get(url)
        self.at(row)

    def text(self, identity: str) -> str:
        return str(self.browser.execute_script(f"return document.getElementById({identity!r})?.textContent ?? ''"))

    def at(self, row: int) -> None:
        """Wait until this record is shown with its picture."""
        wait_for(
            lambda: (
                self.text("id") == f"r{row}"
                and self.browser.execute_script("return document.body.dataset.row") == str(row)
            )
        )

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.browser)
        chain.send_keys(*keys).perform()

    def save(self) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()


def test_a_reviewer_decides_by_keyboard_and_nothing_is_lost_when_the_server_is_killed(
    dataset: Path, browser: Any
) -> None:
    from selenium.webdriver.common.keys import Keys

    page = Page(browser)
    process, url = start(dataset)
    try:
        page.open(url, 0)
        assert "token" not in browser.current_url
        boxes = len(next(iter(read_records(dataset))).regions)
        assert browser.execute_script("return document.querySelectorAll('.picture rect').length") == boxes
        assert browser.execute_script("return document.querySelector('.picture img').naturalWidth") == 64
        page.press("a")
        page.at(1)
        page.press("r")
        page.at(2)
        page.press("e")
        area = browser.switch_to.active_element
        assert area.tag_name == "textarea"
        area.clear()
        area.send_keys("There are a few, a reader said.")  # "a" and "r" are text here
        page.save()
        page.at(3)
        page.press("a")
        page.at(4)
        page.press("u")
        page.at(3)
        assert page.text("decision") == ""
        page.press(Keys.ARROW_LEFT)
        page.at(2)
        assert page.text("decision") == "edited"
        wait_for(lambda: page.text("progress").startswith("3 of 8 decided: 1 accepted, 1 edited, 1 rejected"))
        browser.refresh()
        page.at(3)  # the first that is undecided
        assert page.text("progress").startswith("3 of 8")
        page.press("a")
        page.at(4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.press("a")
        wait_for(lambda: "does not answer" in page.text("message"))
        process, url = start(dataset)
        page.open(url, 4)
        wait_for(lambda: page.text("progress").startswith("4 of 8 decided: 2 accepted, 1 edited, 1 rejected"))
        page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
        page.at(2)
        assert "There are a few, a reader said." in page.text("turns")
        browser.execute_script(
            "const s = document.getElementById('type'); s.value = '1'; s.dispatchEvent(new Event('change'))"
        )
        wait_for(lambda: page.text("place") == "3 of 4")
        browser.execute_script("document.getElementById('export').click()")
        wait_for(lambda: "3 accepted records" in page.text("message"))
        severe = [entry for entry in browser.get_log("browser") if "ERR_CONNECTION_REFUSED" not in entry["message"]]
        assert severe == []
    finally:
        process.kill()
        process.wait()
    accepted = list(read_records(dataset.with_name("data.accepted.jsonl")))
    assert [record.id for record in accepted] == ["r0", "r2", "r3"]
    assert accepted[1].turns[1].text == "There are a few, a reader said."
    assert accepted[1].provenance["review"] == {"reviewers": ["reviewer 1"], "edited": True}


def test_two_reviewers_see_how_far_they_agree(dataset: Path, browser: Any) -> None:
    page = Page(browser)
    with serving(dataset) as server:
        for row, action in enumerate(["accept", "accept", "reject", "accept"]):
            call(server, "/api/decide", {"reviewer": "Ada", "row": row, "action": action})
        page.open(url_of(server), 0)
        script = (
            "const r = document.getElementById('reviewer'); r.value = 'Grace'; r.dispatchEvent(new Event('change'))"
        )
        browser.execute_script(script)
        for row, key in enumerate("aara"):
            page.at(row)
            page.press(key)
        wait_for(lambda: page.text("agreement") == "Ada / Grace: κ 1.00, 100 % alike of 4")
        page.at(4)
        page.press("u")
        page.at(3)
        page.press("r")
        wait_for(lambda: page.text("agreement") == "Ada / Grace: κ 0.50, 75 % alike of 4")


# --- who may ask --------------------------------------------------------------------------------------------------------


def test_requests_that_do_not_come_from_the_page_are_refused(dataset: Path) -> None:
    rows = "/api/rows?reviewer=a"
    decision = {"reviewer": "a", "row": 0, "action": "accept"}
    with serving(dataset) as server:
        port = server.server_address[1]
        assert call(server, rows)[0] == 200
        assert call(server, rows, Host=f"localhost:{port}")[0] == 200
        refused: list[dict[str, str | None]] = [
            {"X_Review_Token": None}, {"X_Review_Token": "x" * 32}, {"X_Review_Token": ""}, {"Host": f"evil.example:{port}"},
            {"Host": "127.0.0.1"}, {"Host": None}, {"Origin": "http://evil.example"}, {"Origin": "null"},
            {"Origin": f"https://127.0.0.1:{port}"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
        ]  # fmt: skip
        for headers in refused:
            assert call(server, rows, **headers)[0] == 403, headers
            assert call(server, "/api/decide", decision, **headers)[0] == 403, headers
            assert call(server, "/api/picture?reviewer=a&row=0", **headers)[0] == 403, headers
        assert call(server, "/", X_Review_Token=None)[0] == 200  # the page itself holds no data
        assert call(server, "/", Host="evil.example")[0] == 403
        assert call(server, "/api/decide", decision, Content_Type="text/plain")[0] == 400
        assert call(server, "/api/decide", decision, Origin=f"http://127.0.0.1:{port}")[0] == 200
        assert len(server.log.by_record()) == 1


def test_bad_requests_get_generic_texts_and_change_nothing(dataset: Path) -> None:
    with serving(dataset) as server:
        cases: list[tuple[int, Any]] = [
            (400, b"{not json"), (400, [1]), (400, {"reviewer": "", "row": 0, "action": "accept"}),
            (400, {"reviewer": "a\n", "row": "x", "action": "accept"}), (404, {"reviewer": "a", "row": 99, "action": "accept"}),
            (400, {"reviewer": "a", "row": True, "action": "accept"}), (400, {"reviewer": "a", "row": 0, "action": "delete"}),
            (400, {"reviewer": "a", "row": 0, "action": "edit", "turns": [1]}),
            (422, {"reviewer": "a", "row": 0, "action": "edit", "turns": ["<image> one", " "]}),
            (422, {"reviewer": "a", "row": 0, "action": "edit", "turns": ["without its picture", "x"]}),
            (422, {"reviewer": "a", "row": 0, "action": "edit", "turns": ["<image> x", "y", "z"]}),
        ]  # fmt: skip
        for status, body in cases:
            got, answer = call(server, "/api/decide", body)
            assert (got, set(answer)) == (status, {"error"}), body
            assert str(dataset.parent) not in answer["error"]
        assert call(server, "/api/decide", b"{}", Content_Length=str(MAX_BODY_BYTES + 1))[0] == 413
        assert call(server, "/api/decide", b"{}", Content_Length="-1")[0] == 400
        for path in ("/../data.jsonl", "/page.py", "/api/nothing", "/page.css/../server.py"):
            assert call(server, path)[0] == 404, path
        assert server.log.by_record() == {}
        assert server.log.path.read_bytes() == b""


def test_pictures_come_from_the_image_folder_only(dataset: Path) -> None:
    secret = dataset.parent / "secret.png"
    shutil.copy(next((dataset.parent / "images" / "train").iterdir()), secret)
    (dataset.parent / "images" / "link.png").symlink_to(secret)
    (dataset.parent / "images" / "page.png").write_text("<script>alert(1)</script>")
    (dataset.parent / "images" / "fifo.png").unlink(missing_ok=True)
    os.mkfifo(dataset.parent / "images" / "fifo.png")
    first = next(iter(read_records(dataset)))
    lines = [json.loads(line) for line in dataset.read_text().splitlines()][:1]
    for name in ("../secret.png", "link.png", "page.png", "fifo.png", "missing.png", str(secret)):
        lines.append({"id": name, "image": name, "conversations": lines[0]["conversations"]})
    dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first.images
    with serving(dataset) as server:
        status, data = call(server, "/api/picture?reviewer=a&row=0&place=0")
        assert status == 200
        assert data.startswith(b"\x89PNG")
        for row in range(1, len(lines)):
            status, answer = call(server, f"/api/picture?reviewer=a&row={row}&place=0")
            assert status in (404, 409), lines[row]
            assert "secret" not in json.dumps(answer)
        assert call(server, "/api/picture?reviewer=a&row=0&place=1")[0] == 404


def test_other_machines_need_a_host_and_a_token(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLIT_REVIEW_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(ConfigError, match="--token"):
            open_server(dataset, host=host)
    with pytest.raises(ConfigError, match="at least 16"):
        open_server(dataset, host="0.0.0.0", token="short")
    with serving(dataset) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert len(server.token) >= 32
    with serving(dataset, host="0.0.0.0", token="a-long-enough-token") as server:
        port = server.server_address[1]
        assert call(server, "/api/rows?reviewer=a", Host=f"192.0.2.7:{port}")[0] == 200
        assert call(server, "/api/rows?reviewer=a", Host=f"evil.example:{port}")[0] == 403
    with serving(dataset) as server, pytest.raises(DataError, match="another review"):
        open_server(dataset)
    assert server.log.path.stat().st_mode & 0o077 == 0


# --- the log, export, agreement -----------------------------------------------------------------------------------------


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    for row in range(3):
        log.decide("a", row, "d", "accept")
    log.undo("a")
    log.close()
    whole = log.path.read_bytes()
    for cut in range(len(whole)):
        log.path.write_bytes(whole[:cut])
        again = DecisionLog(log.path)
        lines = whole[:cut].count(b"\n")
        assert len(again.by_record()) == (2 if lines == 4 else lines)
        again.decide("b", 7, "d", "reject")
        again.close()
        assert all(json.loads(line) for line in log.path.read_bytes().splitlines())
    log.path.write_bytes(b"garbage\n" + whole)
    with pytest.raises(DataError, match="line 1 is not a decision"):
        DecisionLog(log.path)


def test_undo_goes_back_to_the_decision_before(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.decide("a", 0, "d", "accept")
    log.decide("b", 0, "d", "reject")
    log.decide("a", 0, "d", "edit", ["x"])
    for expected in ("accept", None):
        assert log.undo("a") is not None
        last = log.last("a", 0)
        assert (last.action if last else None) == expected
    assert log.undo("a") is None
    log.close()
    again = DecisionLog(log.path, write=False)
    assert again.by_record().keys() == {0}
    assert again.reviewers() == ["b"]


def test_export_leaves_out_what_one_rejects_and_refuses_a_changed_file(dataset: Path, tmp_path: Path) -> None:
    with serving(dataset) as server:
        for said in ("a 0 accept", "b 0 reject", "a 1 accept", "b 1 accept", "b 2 reject"):
            reviewer, row, action = said.split()
            assert call(server, "/api/decide", {"reviewer": reviewer, "row": int(row), "action": action})[0] == 200
        assert main(["synth", "review", str(dataset), "--export", str(tmp_path / "out.jsonl")]) == 0  # while it is open
    records = list(read_records(tmp_path / "out.jsonl"))
    assert [record.id for record in records] == ["r1"]
    assert records[0].provenance["review"]["reviewers"] == ["a", "b"]
    original = list(read_records(dataset))
    assert replace(records[0], provenance={}) == original[1]
    write_records(dataset, [original[0], replace(original[1], kind="other"), *original[2:]])
    with pytest.raises(DataError, match="changed since"):
        export_reviews(dataset, out=tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()


def test_scores_of_the_quality_card_are_found_beside_the_dataset(dataset: Path) -> None:
    from vlit.serve.quality import measure_quality

    measure_quality(dataset, workers=1)
    with serving(dataset) as server:
        rows = call(server, "/api/rows?reviewer=a")[1]
        assert len(rows["scores"]["quality"]) == rows["records"] == 8
    write_records(dataset, list(read_records(dataset))[:3])
    with pytest.raises(DataError, match="8 rows"):
        open_server(dataset)


def test_files_that_cannot_be_reviewed_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is not a record"):
        Reviewed(tmp_path / "a.jsonl", images=tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no records"):
        Reviewed(tmp_path / "a.jsonl", images=tmp_path)


def test_kappa_equals_scikit_learn() -> None:
    from random import Random

    from sklearn.metrics import cohen_kappa_score

    rng = Random(0)
    for size in (2, 5, 50):
        left, right = (rng.choices(["accept", "edit", "reject"], k=size) for _ in range(2))
        if len({*left, *right}) > 1:
            assert cohen_kappa(zip(left, right, strict=True)) == pytest.approx(cohen_kappa_score(left, right))
    assert cohen_kappa([]) is None
    assert cohen_kappa([("accept", "accept")]) == 1
    rows = agreement_table(
        {0: {"a": "accept", "b": "accept"}, 1: {"a": "reject", "b": "accept"}, 2: {"a": "accept", "c": "edit"}}
    )
    assert [(row["a"], row["b"], row["records"]) for row in rows] == [("a", "b", 2), ("a", "c", 1)]
