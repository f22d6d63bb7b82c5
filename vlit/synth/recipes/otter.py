"""In-context sets as Otter trains on (MIMIC-IT, arXiv:2306.05425 §3.3.1): each record behind similar solved ones.

For every record the most similar others of the same kind are found, by the text of the question (TF-IDF) or by the picture
(average hash, or a CLIP). They come first, the record itself last, as one conversation of several pictures. Their ids are in
``provenance.rel_ins_ids``, MIMIC-IT's name for them. A record is never its own example, nor is one of the same picture.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from vlit.data.record import Record, from_json, read_records, to_json
from vlit.errors import ConfigError, DataError
from vlit.registry import RECIPES
from vlit.synth.engine.client import PICTURE, picture_files
from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.recipe import Inputs, RecipeConfig, items_of
from vlit.synth.engine.similarity import average_hashes, clip_features, neighbours, tfidf
from vlit.synth.engine.stages import Each, Item, Stage, Whole
from vlit.synth.engine.teacher import open_picture
from vlit.types import Turn


@RECIPES.register("otter")
class OtterRecipe(RecipeConfig):
    """In-context sets: each record behind similar ones (Otter, MIMIC-IT). Takes finished records, asks nobody."""

    type: str = "otter"
    by: Literal["text", "image_hash", "clip"] = "text"
    """What similarity is of."""
    examples: Annotated[int, Field(ge=1, le=10)] = 2
    """Examples before each record, at most (MIMIC-IT: up to 10)."""
    max_turns: Annotated[int, Field(ge=1)] = 1
    """Question-answer turns of each example; the record itself keeps all."""
    clip: str = ""
    """Folder of a CLIP model (transformers), for `by: clip`."""

    def inputs(self, inputs: Inputs) -> list[Item]:
        """The records with one picture."""
        if not inputs.records:
            raise ConfigError("recipe otter: needs finished records. Give --records dataset.jsonl of an earlier run.")
        records = [record for path in inputs.records for record in read_records(path)]
        found = items_of(record for record in records if len(record.images) == 1)
        if not found:
            raise ConfigError("recipe otter: no record with exactly one picture in the given files.")
        if len(found) < len(records):
            print(
                f"synth: {len(records) - len(found)} of {len(records)} records have no picture or several; left out",
                file=sys.stderr,
            )
        return inputs.take(found)

    def stages(self, inputs: Inputs) -> list[Stage]:
        if self.by == "clip" and not self.clip:
            raise ConfigError("recipe.clip: by is clip, but no CLIP folder is given.")

        def pictures(item: Item) -> list[str]:
            return picture_files([item["image"]], inputs.images)[0]

        def look(item: Item) -> list[Item]:
            files, refused = picture_files([item["image"]], inputs.images)
            if refused:
                raise Rejected(PICTURE, refused)
            try:
                open_picture(files[0])
            except DataError as error:
                raise Rejected(PICTURE, str(error)) from error
            return [item]

        def build(items: list[Item]) -> list[Item]:
            records, features = self._features([from_json(item) for item in items], inputs)
            groups = [(record.kind or "") for record in records]
            owners = [str(inputs.images / record.images[0]) for record in records]
            near = neighbours(features, groups=groups, owners=owners, count=self.examples)
            return [
                to_json(in_context(record, [records[n] for n in numbers], self))
                for record, numbers in zip(records, near, strict=True)
                if numbers
            ]

        if self.by == "text":
            return [Whole("sets", self.version(), build)]
        return [Each("pictures", self.version(), look, pictures), Whole("sets", self.version(), build, pictures)]

    def _features(self, records: list[Record], inputs: Inputs) -> tuple[list[Record], Any]:
        """Records and a row for each of them; those whose picture is damaged since it was looked at are left out."""
        if self.by == "text":
            said = (" ".join(t.text for t in r.turns if t.role == "user").replace("<image>", "") for r in records)
            return records, tfidf(list(said))
        found = [(record, files[0]) for record in records if (files := picture_files(record.images, inputs.images)[0])]
        if not found:
            return [], np.zeros((0, 1), np.float32)
        paths = [path for _, path in found]
        rows = average_hashes(paths) if self.by == "image_hash" else clip_features(paths, self.clip)
        known = np.flatnonzero(~np.isnan(rows).any(axis=1))
        if lost := len(records) - len(known):
            print(f"synth: {lost} of {len(records)} pictures cannot be read any more; left out", file=sys.stderr)
        return [found[row][0] for row in known], rows[known]


def in_context(record: Record, examples: list[Record], recipe: OtterRecipe) -> Record:
    """One conversation: the examples, the nearest one last before the record, then the record."""
    turns: list[Turn] = [turn for turn in record.turns if turn.role == "system"]
    for example in reversed(examples):
        said = [turn for turn in example.turns if turn.role != "system"]
        kept = said[: 2 * recipe.max_turns]
        marks = [turn for turn in kept if "<image>" in turn.text]
        if not marks:  # its picture is shown in a later turn, which is cut
            kept = [Turn("user", f"<image>\n{kept[0].text}"), *kept[1:]]
        turns += kept
    turns += [turn for turn in record.turns if turn.role != "system"]
    images = (*(example.images[0] for example in reversed(examples)), *record.images)
    provenance = {"recipe": "otter", "by": recipe.by, "rel_ins_ids": [e.id for e in reversed(examples)]}
    source = {"source": record.provenance} if record.provenance else {}
    return Record(
        f"{record.id}-in-context", tuple(turns), images, kind=record.kind, domain=record.domain,
        instruction_type=record.instruction_type, provenance=provenance | source,
    )  # fmt: skip
