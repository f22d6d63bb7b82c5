"""``vlit synth review``: open dataset and log, serve until interrupted; or write what was accepted."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from vlit.errors import ConfigError, DataError
from vlit.serve.quality import image_folder, make_writable, metrics_of, refuse_to_replace
from vlit.serve.review.dataset import Reviewed, export
from vlit.serve.review.log import DecisionLog
from vlit.serve.review.server import ReviewServer, is_loopback

LOOPBACK = "127.0.0.1"
MIN_TOKEN = 16
TOKEN_VARIABLE = "VLIT_REVIEW_TOKEN"


def log_of(dataset: Path, log: Path | None) -> Path:
    """The decisions of a dataset: the file given, or ``<dataset>.reviews.jsonl``."""
    return log or dataset.with_name(dataset.name.removesuffix(".jsonl") + ".reviews.jsonl")


def open_server(
    dataset: Path,
    *,
    images: Path | None = None,
    scores: Path | None = None,
    log: Path | None = None,
    port: int = 0,
    host: str | None = None,
    token: str | None = None,
) -> ReviewServer:
    """A server that is bound and not yet serving.

    Raises:
        ConfigError: other machines could reach it and no token was given, or the token is short.
        DataError: dataset, log or address cannot be used.
    """
    token = token or os.environ.get(TOKEN_VARIABLE)
    host = host or LOOPBACK
    if not is_loopback(host) and token is None:
        raise ConfigError(f"--host {host}: others can reach this address. Give --token or {TOKEN_VARIABLE} as well.")
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(f"--token: {len(token)} characters, at least {MIN_TOKEN} printable ones are needed.")
    root = image_folder(dataset, images) or dataset.parent
    card = dataset.with_name(dataset.name.removesuffix(".jsonl") + ".quality")
    places = (metrics_of(dataset), card / "metrics.parquet")
    found = scores or next((path for path in places if path.is_file()), None)
    data = Reviewed(dataset, images=root, scores=found)
    out = dataset.with_name(dataset.name.removesuffix(".jsonl") + ".accepted.jsonl")
    path = log_of(dataset, log)
    refuse_to_replace(path, "--log", dataset, out)
    make_writable(path.parent, f"--log {path}")
    decisions = DecisionLog(path)
    try:
        return ReviewServer((host, port), data=data, log=decisions, token=token or secrets.token_urlsafe(24), out=out)
    except (OSError, OverflowError) as error:
        decisions.close()
        raise DataError(
            f"{host}:{port}: cannot listen there ({error}). Choose another --port, or 0 for a free one."
        ) from error


def url_of(server: ReviewServer) -> str:
    """The address to open; the token stands in the fragment, which browsers do not send."""
    host, port = server.server_address[:2]
    name = str(host)
    if server.any_host:
        name = LOOPBACK
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/#token={server.token}"


def review(server: ReviewServer) -> None:
    """Serve until interrupted, then close the server and its log."""
    print(f"review     {url_of(server)}", flush=True)
    print(f"decisions  {server.log.path}", file=sys.stderr)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        server.log.close()


def export_reviews(dataset: Path, *, out: Path, log: Path | None = None) -> int:
    """Write what was accepted, also while a review is running."""
    path = log_of(dataset, log)
    if not path.is_file():
        raise DataError(f"{path}: no decisions yet. Run vlit synth review {dataset} first.")
    refuse_to_replace(out, "--export", dataset, path)
    make_writable(out.parent, f"--export {out}")
    data = Reviewed(dataset, images=dataset.parent)
    count = export(data, DecisionLog(path, write=False), out)
    print(f"{count:,} accepted records  {out}", file=sys.stderr)
    return count
