"""MMInstruct (arXiv:2407.15838; github.com/yuecao0119/MMInstruct): LLaVA-like JSONL, whose domain is the name of the file.

``jsons_per_domain/{caption,qa}_per_domain/{domain}_en.jsonl`` and ``jsons_all/{caption_cn,caption_en,qa_en}.jsonl``; rows are
``{"image", "conversations"}``. A folder is read as all of its ``.jsonl`` files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlit.data.formats._reader import RecordFormat, an_object, parse, turns_of, with_pictures
from vlit.data.json_stream import iter_json_records
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, identity_of, kind_of, read_images, read_turns
from vlit.registry import FORMATS

_WHOLE = ("caption", "qa")


@FORMATS.register("mminstruct")
class MmInstructFormat(RecordFormat):
    """A `.jsonl` file of MMInstruct, or a folder of them (one a domain)."""

    type: str = "mminstruct"

    def files(self, path: Path) -> list[Path]:
        """The files of a folder and of the folders in it, by name."""
        return sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]

    def entries(self, path: Path) -> Iterator[Any]:
        """The rows of all files, each with its file."""
        for file in self.files(path):
            stem, _, language = file.stem.rpartition("_")
            domain, language = (stem, language) if language in ("en", "cn", "zh") else (file.stem, "")
            kind = next((kind for kind in _WHOLE if f"{kind}_" in f"{file.parent.name}_{file.stem}"), "qa")
            for number, raw in enumerate(iter_json_records(file)):
                entry = parse(raw)
                if isinstance(entry, dict):
                    named = {"id": f"{file.stem}/{number}"} if entry.get("id") is None else {}
                    entry = {**entry, **named, "domain": domain, "kind": kind, "language": language}
                yield entry

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """The conversation; a caption file makes captions, any other questions."""
        entry = an_object(entry)
        images = read_images(entry)
        if not images:
            raise BadRecord(f"image is {kind_of(entry.get('image'))}, expected a path", "image_path")
        roles, texts = read_turns(entry)
        domain = None if entry["domain"] in _WHOLE else entry["domain"]
        provenance = {"language": entry["language"]} if entry["language"] else {}
        return Record(
            identity_of(entry, number), with_pictures(turns_of(roles, texts), len(images)), tuple(images),
            kind=entry["kind"], domain=domain, instruction_type="caption" if entry["kind"] == "caption" else None,
            provenance=provenance,
        )  # fmt: skip
