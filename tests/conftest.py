"""Fixtures shared by the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tiny parts of ``tests.tiny``; each is built on first use and shared by the whole run."""
    return tmp_path_factory.mktemp("tiny")
