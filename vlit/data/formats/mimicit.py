"""MIMIC-IT, the data of Otter (arXiv:2306.05425; github.com/Luodian/Otter): instructions, base64 images, in-context
examples.

``LA_instructions.json`` is ``{"meta", "data": {ID: {"instruction", "answer", "image_ids", "rel_ins_ids"}}}``; ``LA.json``
beside it is ``{image_id: base64}`` (or ``LA.parquet``: column ``base64``, indexed by image id); ``LA_train.json`` is ``{ID:
[IDs of examples]}``. Images are read from ``LA.json`` where they stand (reference ``LA.json#image_id``). Records of text
only have no ``image_ids``, or null. With ``in_context`` the examples become earlier exchanges of the
conversation, pictures included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vlit.data.formats._reader import RecordFormat, an_object, ask, list_of, load_json, member, text_of
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, kind_of
from vlit.registry import FORMATS
from vlit.types import Turn

_ENDING = "_instructions.json"


@FORMATS.register("mimicit")
class MimicItFormat(RecordFormat):
    """`XX_instructions.json` of MIMIC-IT with `XX.json` (images) and `XX_train.json` (examples) beside it."""

    type: str = "mimicit"
    images_file: str = ""
    """Name of the image file, `.json` or `.parquet`. Empty: `XX.json` for `XX_instructions.json`."""
    context_file: str = ""
    """Name of the file of in-context examples. Empty: `XX_train.json`, where it exists, else each record's `rel_ins_ids`."""
    in_context: Annotated[int, Field(ge=0)] = 0
    """Examples in front of each record, at most."""
    max_images: Annotated[int, Field(ge=1)] = 16
    """A record of more pictures (video frames) is refused: each would be encoded whole."""

    def files(self, path: Path) -> list[Path]:
        """Instructions, and examples where they are used."""
        context = self._context_path(path)
        return [path, context] if self.in_context and context.is_file() else [path]

    def entries(self, path: Path) -> Iterator[Any]:
        """Every instruction with its examples."""
        data = member(load_json(path), "data", path, expected=dict)
        context = self._context_path(path)
        listed = load_json(context) if self.in_context and context.is_file() else {}
        for identity, entry in data.items():
            if not isinstance(entry, dict):
                yield BadRecord(f"record {identity!r} is {kind_of(entry)}, expected an object with instruction")
                continue
            named = listed.get(identity, entry.get("rel_ins_ids")) if self.in_context else None
            yield {**entry, "id": identity, "examples": self._examples(identity, named, data)}

    def _examples(self, identity: str, named: Any, data: dict[str, Any]) -> list[tuple[str, Any]]:
        if not isinstance(named, list):
            return []
        others = [name for name in named if isinstance(name, str) and name != identity]
        return [(name, data.get(name)) for name in others[: self.in_context]]

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Examples first, then the exchange itself; each with its own pictures."""
        turns: list[Turn] = []
        images: list[str] = []
        names: list[str] = []
        for name, example in entry["examples"]:
            if not isinstance(example, dict):
                raise BadRecord(f"rel_ins_ids names {name!r}, which is no record of this file", "fields")
            try:
                self._add(example, path, turns, images)
            except BadRecord as bad:
                raise BadRecord(f"example {name!r}: {bad}", bad.check) from bad
            names.append(name)
        self._add(entry, path, turns, images)
        if len(images) > self.max_images:
            raise BadRecord(f"image_ids: {len(images)} pictures, more than max_images {self.max_images}", "fields")
        kind = "in_context" if names else "images" if len(images) > 1 else "image" if images else "text"
        provenance = {"in_context": names} if names else {}
        return Record(entry["id"], tuple(turns), tuple(images), kind=kind, provenance=provenance)

    def _add(self, entry: dict[str, Any], path: Path, turns: list[Turn], images: list[str]) -> None:
        entry = an_object(entry)
        own = [] if entry.get("image_ids") is None else list_of(entry, "image_ids", str)
        turns += ask(text_of(entry, "instruction"), text_of(entry, "answer"), images=len(own))
        images += [f"{self.images_file or path.name.replace(_ENDING, '.json')}#{image}" for image in own]

    def _context_path(self, path: Path) -> Path:
        return path.with_name(self.context_file or path.name.replace(_ENDING, "_train.json"))
