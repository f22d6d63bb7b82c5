"""Weights & Biases, offline without a key or a network; ``wandb sync`` uploads offline runs later."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from vlit.config.component import ComponentConfig
from vlit.errors import ConfigError
from vlit.registry import TRACKERS
from vlit.train.tracker import scalars

DEFAULT_URL = "https://api.wandb.ai"


@TRACKERS.register("wandb")
class WandbConfig(ComponentConfig):
    """Logs to Weights & Biases; files lie in `<output_dir>/wandb`."""

    type: Literal["wandb"] = "wandb"
    project: str = "vlit"
    """Project the run belongs to."""
    entity: str | None = None
    """Team or user. Default: the account's own."""
    run_name: str | None = None
    """Display name. Default: the name of the run folder."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto`: online when an API key is set and the server answers, else offline. `online` refuses to start instead."""

    def build(self, **kwargs: Any) -> WandbTracker:
        return WandbTracker(project=self.project, entity=self.entity, run_name=self.run_name, mode=self.mode)


class WandbTracker:
    """Implements :class:`vlit.train.tracker.Tracker`. A resumed run keeps its id (``<run_dir>/wandb_run_id``)."""

    def __init__(
        self, *, project: str, entity: str | None = None, run_name: str | None = None, mode: str = "auto"
    ) -> None:
        self.project = project
        self.entity = entity
        self.run_name = run_name
        self.mode = mode
        self._run: Any = None
        self._steps_defined: set[str] = set()

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"trackers: wandb is not installed ({error}). pip install vlit[wandb].") from error
        mode = choose_mode(self.mode)
        id_file = run_dir / "wandb_run_id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name or run_dir.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(silent=True),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        numbers, step = scalars(row)
        stage = str(row.get("stage") or "")
        axis = f"{stage}/step" if stage else "step"
        if axis not in self._steps_defined:
            self._steps_defined.add(axis)
            self._run.define_metric(f"{stage}/*" if stage else "*", step_metric=axis)
        self._run.log({**numbers, axis: step})

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def choose_mode(mode: str) -> Literal["online", "offline"]:
    """``auto`` -> online only with a key and an answering server; the variable ``WANDB_MODE=offline`` is respected.

    Raises:
        ConfigError: ``online`` was asked for and there is no key or no network; said before training, not at its end.
    """
    if mode == "offline" or (mode == "auto" and os.environ.get("WANDB_MODE", "online") != "online"):
        return "offline"
    url = urlsplit(os.environ.get("WANDB_BASE_URL", DEFAULT_URL))
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    missing = "an API key (wandb login, or WANDB_API_KEY)" if not _has_key(host) else ""
    if not missing and not _answers(host, port):
        missing = f"a connection to {host}:{port}"
    if not missing:
        return "online"
    if mode == "online":
        raise ConfigError(f"trackers: wandb mode online needs {missing}. Provide it, or use mode: auto or offline.")
    return "offline"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False
