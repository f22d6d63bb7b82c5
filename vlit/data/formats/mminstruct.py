"""MMInstruct (arXiv:2407.15838; github.com/yuecao0119/MMInstruct): LLaVA-like JSONL, whose domain is the name of the file.

``jsons_per_domain/{caption,qa}_per_domain/{domain}_en.jsonl`` and ``jsons_all/{caption_cn,caption_en,qa_en}.jsonl``; rows are
``{"image", "conversations"}``. A folder is read as all of its ``.jsonl`` files; both folders hold the same rows, so one of
them is named. Rows have no id: theirs is the file's name (with its folders where another file has the same) and their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlit.data.formats._reader import RecordFormat, an_object, parse, turns_of, with_pictures
from vlit.data.json_stream import iter_json_records
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, identity_of, kind_of, read_images, read_turns
from vlit.errors import DataError
from vlit.registry import FORMATS

_WHOLE = ("caption", "qa")
_SAME_ROWS = ("jsons_all", "jsons_per_domain")


@FORMATS.register("mminstruct")
class MmInstructFormat(RecordFormat):
    """A `.jsonl` file of MMInstruct, or a folder of them (one a domain)."""

    type: str = "mminstruct"

    def files(self, path: Path) -> list[Path]:
        """The files of a folder and of the folders in it, by name."""
        if not path.is_dir():
            return [path]
        files = sorted(path.rglob("*.jsonl"))
        folders = {folder for file in files for folder in file.relative_to(path).parts[:-1]}
        if folders.issuperset(_SAME_ROWS):
            raise DataError(
                f"{path}: holds {' and '.join(_SAME_ROWS)}, which have the same rows. Name one of them as path."
            )
        return files

    def entries(self, path: Path) -> Iterator[Any]:
        """The rows of all files, each with its file."""
        files = self.files(path)
        stems = Counter(file.stem for file in files)
        for file in files:
            unique = stems[file.stem] == 1
            name = file.stem if unique else file.relative_to(path).with_suffix("").as_posix()
            stem, _, language = file.stem.rpartition("_")
            domain, language = (stem, language) if language in ("en", "cn", "zh") else (file.stem, "")
            kind = next((kind for kind in _WHOLE if f"{kind}_" in f"{file.parent.name}_{file.stem}"), "qa")
            for number, raw in enumerate(iter_json_records(file)):
                entry = parse(raw)
                if isinstance(entry, dict):
                    named = {"id": f"{name}/{number}"} if entry.get("id") is None else {}
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
