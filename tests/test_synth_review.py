"""The review page: driven in a real browser, killed and attacked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.review_fixture import call, serving
from vlit.data.record import read_records
from vlit.errors import ConfigError, DataError
from vlit.serve.review.command import open_server, url_of
from vlit.serve.review.server import MAX_BODY_BYTES

pytest_plugins = ["tests.review_fixture"]

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
]  # fmt: skip


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
