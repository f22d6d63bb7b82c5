"""What an image generator is: a prompt and a seed in, one picture file out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlit.config.component import ComponentConfig
from vlit.durable import make_folder


class ImageGenerator:
    """Base of all generators."""

    abilities = "photo"
    """Which keyword lists suit it (``prompts/stablellava/abilities_<name>``)."""

    def generate(self, prompt: str, target: Path, *, seed: int) -> None:
        """Write a PNG of ``prompt`` to ``target``; the same seed gives the same picture. Rejected: it cannot draw that."""
        raise NotImplementedError(f"{type(self).__name__} must implement generate")

    def write(self, prompt: str, target: Path, *, seed: int) -> None:
        """The picture at ``target``, complete or absent; one that is there is kept."""
        if target.is_file():
            return
        make_folder(target.parent)
        aside = target.with_name(f".{target.stem}.{os.getpid()}.writing{target.suffix}")
        try:
            self.generate(prompt, aside, seed=seed)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)


class GeneratorConfig(ComponentConfig):
    """Base of all generators' configurations."""

    def build(self, **kwargs: Any) -> ImageGenerator:
        """The generator."""
        raise NotImplementedError(f"{type(self).__name__} must implement build")
