"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from vlit.types import ModelSpec

WHOLE_RUNS = {
    "test_docs_clusters", "test_lock", "test_lost_ranks", "test_plan", "test_preflight", "test_resume_ranks", "test_slurm",
    "test_strategies", "test_watchdog",
}  # fmt: skip
"""Test modules that start torchrun, launchers or fresh processes again and again: ``make test-slow``."""


settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("other")  # new examples every time: HYPOTHESIS_PROFILE=other
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # shells start background jobs with Ctrl-C ignored, and the commands under test would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none; whole test modules of many processes are ``slow``."""
    for item in items:
        if item.path.stem in WHOLE_RUNS:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tiny parts of ``tests.tiny``; each is built on first use and shared by the whole run."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_spec(tiny_dir: Path) -> ModelSpec:
    """What the data floor knows of the model of :func:`tests.tiny_run.tiny_run`."""
    from tests.tiny_run import tiny_run
    from vlit.models.assemble import model_spec

    return model_spec(tiny_run(tiny_dir, tiny_dir / "unused").model)
