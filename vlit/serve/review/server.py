"""The local server of the review page: standard library, loopback, a token for every request that reads or writes data.

What stands between the data and a web page open in the same browser: the token is random and in the URL's fragment, so it
is never sent to a server or written to a log; requests carry it in a header, which other origins cannot set without a
preflight that is never granted; ``Host`` must be an address this server was started on (a name rebound to 127.0.0.1 is
refused); ``Origin`` must match.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson

from vlit.errors import VlitError
from vlit.serve.review.agreement import agreement_table
from vlit.serve.review.dataset import Reviewed, export
from vlit.serve.review.log import ACTIONS, DecisionLog
from vlit.types import IMAGE_PLACEHOLDER

MAX_BODY_BYTES = 1 << 20
TIMEOUT_S = 20
FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
REFUSALS = {
    400: "The request is not understood.", 403: "Refused. Open the address that vlit printed.", 404: "There is no such thing.",
    409: "The dataset changed, or the decision cannot be kept.", 413: "The request is too large.",
    422: "The turns are not a record that can be trained on: no turn may be empty, and every picture's mark stays in its turn.",
    500: "The server failed; its terminal says more.",
}  # fmt: skip
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,40}")


class Refused(Exception):
    """Answer with this status and its generic text."""

    def __init__(self, status: int) -> None:
        super().__init__(REFUSALS[status])
        self.status = status


class ReviewServer(ThreadingHTTPServer):
    """Serves one dataset; ``hosts`` are the values of ``Host`` that are answered."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], *, data: Reviewed, log: DecisionLog, token: str, out: Path) -> None:
        host = address[0]
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)
        self.data, self.log, self.token, self.out = data, log, token, out
        port = self.server_address[1]
        names = {f"[{host}]" if ":" in host else host}
        if is_loopback(host):
            names |= {"localhost", "127.0.0.1", "[::1]"}
        self.hosts = {f"{name}:{port}".lower() for name in names}
        self.any_host = host in ("0.0.0.0", "::")

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server; on all interfaces any IP address with the port does, names do not."""
        if host.lower() in self.hosts:
            return True
        name, _, port = host.rpartition(":")
        return self.any_host and port == str(self.server_address[1]) and _is_address(name.strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    """One request. Every refusal has a generic text; details go nowhere but the terminal."""

    server: ReviewServer
    server_version, sys_version = "vlit", ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """No line a request: the terminal is for what matters."""

    def _answer(self, act: Any) -> None:
        try:
            try:
                kind, body = act()
                status = 200
            except Refused as refused:
                raise refused
            except OSError as error:
                self.log_error_line(error)
                raise Refused(500) from error
            except Exception as error:
                self.log_error_line(error)
                raise Refused(409 if isinstance(error, VlitError) else 500) from error
        except Refused as refused:
            status, kind, body = refused.status, "application/json", orjson.dumps({"error": str(refused)})
            self.close_connection = True
        try:
            self._send(status, kind, body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True

    def log_error_line(self, error: Exception) -> None:
        """One line on the terminal."""
        import sys

        print(f"review: {type(error).__name__}: {error}".replace("\n", " ")[:500], file=sys.stderr)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        charset = "; charset=utf-8" if kind.startswith(("text/", "application/json")) else ""
        for name, value in (
            ("Content-Type", kind + charset), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
            ("X-Frame-Options", "DENY"), ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _guard(self, *, token: bool) -> None:
        """Refuse what does not come from our own page."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows_host(hosts[0]):
            raise Refused(403)
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            raise Refused(403)
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise Refused(403)
        if token:
            given = self.headers.get("X-Review-Token", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, self.server.token.encode()):
                raise Refused(403)

    def _get(self) -> tuple[str, bytes]:
        url = urlsplit(self.path)
        if url.path in FILES:
            self._guard(token=False)
            name, kind = FILES[url.path]
            return kind, Path(__file__).with_name(name).read_bytes()
        self._guard(token=True)
        asked = {key: values[0] for key, values in parse_qs(url.query, max_num_fields=20).items()}
        data = self.server.data
        if url.path == "/api/rows":
            return _json(self._rows(_name(asked)))
        if url.path == "/api/summary":
            return _json(self._summary(_name(asked)))
        if url.path == "/api/record":
            return _json(self._record(_row(asked, data), _name(asked)))
        if url.path == "/api/picture":
            try:
                return data.picture(_row(asked, data), _whole(asked.get("place", "0")))
            except VlitError as error:
                raise Refused(404) from error
        raise Refused(404)

    def _post(self) -> tuple[str, bytes]:
        self._guard(token=True)
        if self.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            raise Refused(400)
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or "Transfer-Encoding" in self.headers:
            raise Refused(400)
        if int(length[:12]) > MAX_BODY_BYTES:
            raise Refused(413)
        try:
            asked = orjson.loads(self.rfile.read(int(length)))
        except orjson.JSONDecodeError as error:
            raise Refused(400) from error
        if not isinstance(asked, dict):
            raise Refused(400)
        path = urlsplit(self.path).path
        if path == "/api/decide":
            return _json(self._decide(asked))
        if path == "/api/undo":
            undone = self.server.log.undo(_name(asked))
            return _json({"row": None if undone is None else undone.record})
        if path == "/api/export":
            return _json(
                {"records": export(self.server.data, self.server.log, self.server.out), "file": self.server.out.name}
            )
        raise Refused(404)

    def _decide(self, asked: dict[str, Any]) -> dict[str, Any]:
        data, reviewer, row = self.server.data, _name(asked), _row(asked, self.server.data)
        action, texts = asked.get("action"), asked.get("turns") or []
        if action not in ACTIONS or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(400)
        if action == "edit":
            try:
                texts = [turn.text for turn in data.edited(row, texts).turns]
            except VlitError as error:
                raise Refused(422) from error
        decision = self.server.log.decide(reviewer, row, data.digest(row), action, texts if action == "edit" else ())
        return {"row": row, "action": decision.action, "number": decision.number}

    def _rows(self, reviewer: str) -> dict[str, Any]:
        """What the page filters by: groups as numbers into their names, scores, and this reviewer's decisions."""
        data = self.server.data
        held: dict[str, Any] = {"records": len(data), "name": data.path.name, "scores": data.scores}
        for name, values in (("domain", data.domains), ("type", data.types)):
            names = sorted(set(values))
            place = {value: at for at, value in enumerate(names)}
            held[name] = {"names": names, "of": [place[value] for value in values]}
        mine = {
            row: by_name[reviewer].action for row, by_name in self.server.log.by_record().items() if reviewer in by_name
        }
        held["decisions"] = [[row, action] for row, action in mine.items()]
        return held

    def _summary(self, reviewer: str) -> dict[str, Any]:
        decided = self.server.log.by_record()
        actions = {row: {name: d.action for name, d in by_name.items()} for row, by_name in decided.items()}
        mine = [by_name[reviewer] for by_name in actions.values() if reviewer in by_name]
        return {
            "mine": {action: mine.count(action) for action in ACTIONS},
            "reviewers": self.server.log.reviewers(),
            "agreement": agreement_table(actions),
        }

    def _record(self, row: int, reviewer: str) -> dict[str, Any]:
        data = self.server.data
        record, decision = data.record(row), self.server.log.last(reviewer, row)
        changed = decision is not None and decision.digest != data.digest(row)
        edited = () if decision is None or changed else decision.turns
        texts = edited or [turn.text for turn in record.turns]
        return {
            "row": row, "id": record.id, "domain": record.domain, "type": record.instruction_type or record.kind,
            "turns": [
                {"role": turn.role, "text": text, "was": turn.text}
                for turn, text in zip(record.turns, texts, strict=False)
            ],
            "pictures": len(record.images), "options": record.options, "placeholder": IMAGE_PLACEHOLDER,
            "regions": [{"label": r.label, "box": r.box, "image": r.image} for r in record.regions],
            "decision": None if decision is None else decision.action,
            "changed": changed,
            "scores": {name: values[row] for name, values in data.scores.items()},
        }  # fmt: skip


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", orjson.dumps(value)


def _whole(text: Any) -> int:
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 12:
        raise Refused(400)
    return int(text)


def _row(asked: dict[str, Any], data: Reviewed) -> int:
    row = _whole(asked.get("row"))
    if not 0 <= row < len(data):
        raise Refused(404)
    return row


def _name(asked: dict[str, Any]) -> str:
    name = asked.get("reviewer")
    if not isinstance(name, str) or not _NAME.fullmatch(name.strip()):
        raise Refused(400)
    return name.strip()
