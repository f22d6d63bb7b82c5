"""The held-out questions of the embedded digit world: unseen handwriting, exact match, chance known per kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from vlit.config.component import ComponentConfig
from vlit.errors import EvaluationError
from vlit.eval.benchmarks.qa import QaBenchmark
from vlit.registry import BENCHMARKS


@BENCHMARKS.register("digits")
class DigitsConfig(ComponentConfig):
    """Held-out questions of the embedded world. Choose on `validation`; score `test` once."""

    type: Literal["digits"] = "digits"
    world: str = "outputs/world/digits"
    """Folder of the built world."""
    split: Literal["validation", "test"] = "validation"
    """Held-out part to ask."""
    max_questions: int | None = None
    """Only the first so many questions."""

    def build(self, **kwargs: Any) -> QaBenchmark:
        """Raises EvaluationError when the world has not been built."""
        root = Path(self.world)
        return QaBenchmark(
            f"digits-{self.split}",
            root / f"questions_{self.split}.jsonl",
            image_root=root / "images",
            chance=chance_levels(root / "manifest.json"),
            max_questions=self.max_questions,
        )


def chance_levels(manifest: Path) -> dict[str, float]:
    """Chance per kind: the better of the most frequent training answer and the best guess from the question's text."""
    try:
        levels = json.loads(manifest.read_text(encoding="utf-8"))["chance"]
        return {kind: max(float(row["majority"]), float(row["question_only"])) for kind, row in levels.items()}
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{manifest}: no world is built here. Run a command that builds it, or set benchmark.world."
        ) from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{manifest}: not the manifest of a digit world ({error!r}). Build the world again."
        ) from error
