"""An existing dataset joins a build: MMInstruct's expansion by public question sets (arXiv:2407.15838 §3.4).

Records are read by any registered format. Where ``asks_for`` says which form the answers have, the words that ask for it are
put behind each question, drawn from the same lists as those of new questions (LLaVA-1.5's response-format prompts,
arXiv:2310.03744 §3.2), so that old and new questions of a type ask alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vlit.config.component import component
from vlit.data.formats._base import BadRow, place_of, record_of
from vlit.data.record import Record
from vlit.errors import DataError
from vlit.registry import RECIPES
from vlit.synth.engine.prompts import read_list
from vlit.synth.engine.recipe import Inputs, RecipeConfig, items_of, random_for
from vlit.synth.engine.stages import Each, Item, Stage


@RECIPES.register("expand")
class ExpandRecipe(RecipeConfig):
    """Records of an existing dataset in any known format, asking for their form of answer (MMInstruct's expansion)."""

    type: str = "expand"
    path: str
    """Dataset file, or the folder of a format that reads folders."""
    format: component("format") = {"type": "llava"}  # type: ignore[valid-type]
    """How its records are read."""
    asks_for: Literal["judgement", "choice", "short", "long"] | None = None
    """Form of its answers: words that ask for it are put behind each question. Null: questions stay as they are."""
    domain: str | None = None
    """Domain of all records; null: their own."""
    image_prefix: str = ""
    """Put before its image paths, so that they are relative to the build's `images`."""

    def inputs(self, inputs: Inputs) -> list[Item]:
        """The dataset's records.

        Raises:
            DataError: a record is bad; the first one is named.
        """
        return inputs.take(items_of(self._records()))

    def _records(self) -> list[Record]:
        path = Path(self.path)
        found = []
        for row in self.format.iter_rows(path):
            if isinstance(row, BadRow):
                raise DataError(
                    f"{place_of(path, row.record, row.id)}: {row.reason}. Mend it, or write the good records with vlit convert "
                    "--on-bad-record quarantine and expand by these."
                )
            record = record_of(row)
            found.append(replace(record, images=tuple(self.image_prefix + name for name in record.images)))
        return found

    def stages(self, inputs: Inputs) -> list[Stage]:
        words, version = read_list(f"format/{self.asks_for}", own=self.prompts) if self.asks_for else ([""], "")

        def ask_alike(item: Item) -> list[Item]:
            rng = random_for(inputs.seed, "expand", item["id"])
            turns: list[dict[str, Any]] = []
            for turn in item["conversations"]:
                wanted = rng.choice(words) if turn["from"] == "human" else ""
                turns.append(turn | {"value": "\n".join(filter(None, (turn["value"], wanted)))})
            about = {"kind": self.asks_for, "instruction_type": self.asks_for, "domain": self.domain}
            provenance = {"source": Path(self.path).stem} | item.get("provenance", {}) | {"recipe": "expand"}
            known = {key: value for key, value in about.items() if value is not None}
            return [item | known | {"conversations": turns, "provenance": provenance}]

        return [Each("expand", self.version(version, str(inputs.seed)), ask_alike)]
