"""The embedded world with few pictures."""

from __future__ import annotations

from pathlib import Path

from vlit.synth.digits.world import WorldPaths, ensure_world


def small_world(folder: Path, *, train: int, test: int = 1) -> WorldPaths:
    """``train`` training and ``test`` test pictures, one of validation, one question a kind."""
    return ensure_world(
        folder / "world",
        train_images=train,
        validation_images=1,
        test_images=test,
        questions_per_kind=1,
        progress=False,
    )
