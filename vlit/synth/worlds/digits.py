"""The embedded world as a component: ``world: {type: digits, root: ...}`` builds it before anything reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vlit.config.component import ComponentConfig
from vlit.registry import WORLDS

Count = Annotated[int, Field(ge=1)]


@WORLDS.register("digits")
class DigitsWorldConfig(ComponentConfig):
    """Scenes of real handwritten digits, with COCO annotations, LLaVA instructions and held-out questions."""

    type: str = "digits"
    root: str = "outputs/world/digits"
    """Folder of the built world."""
    seed: int = 0
    """Decides scenes, wordings and splits."""
    train_images: Count = 8000
    validation_images: Count = 300
    test_images: Count = 400
    questions_per_kind: Count = 100
    """Held-out questions per kind and split."""

    def build(self, **kwargs: Any) -> Path:
        """Build the world unless the same one is there (about 10 s); returns its folder."""
        from vlit.synth.digits.world import ensure_world

        return ensure_world(
            self.root,
            seed=self.seed,
            train_images=self.train_images,
            validation_images=self.validation_images,
            test_images=self.test_images,
            questions_per_kind=self.questions_per_kind,
        ).root
