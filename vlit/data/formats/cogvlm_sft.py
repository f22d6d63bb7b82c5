"""CogVLM-SFT-311K (arXiv:2311.03079; github.com/THUDM/CogVLM, dataset.md): one label file a picture.

A folder ``…_formate`` holds ``images/00000001.jpg`` and ``labels/00000001.json`` (where both languages lie side by side,
``labels_en`` and ``labels_zh``). A label is ``{"captions": [{"role": "caption", "content"}]}`` or ``{"conversations":
[{"role": "user" | "assistant", "content"}]}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import (
    DESCRIBE,
    RecordFormat,
    an_object,
    ask,
    list_of,
    parse,
    pick,
    text_of,
    turns_of,
    with_pictures,
)
from vlit.data.json_stream import read_json_bytes
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, read_turns
from vlit.errors import DataError
from vlit.registry import FORMATS


@FORMATS.register("cogvlm_sft")
class CogVlmSftFormat(RecordFormat):
    """One `…_formate` folder of CogVLM-SFT-311K."""

    type: str = "cogvlm_sft"
    labels: str = ""
    """Folder of the labels. Empty: `labels`, else `labels_en`."""
    image_name: Annotated[str, pattern_of(id="1")] = "images/{id}.jpg"
    """Where the picture of a label lies."""
    instructions: tuple[str, ...] = DESCRIBE
    """One of these stands in front of a caption; which one is decided by its id."""

    def files(self, path: Path) -> list[Path]:
        """The label files, by name."""
        if not path.is_dir():
            raise DataError(f"{path}: is no folder. This format reads a folder with images/ and labels/ in it.")
        names = [self.labels] if self.labels else ["labels", "labels_en"]
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is None:
            raise DataError(f"{path}: holds no folder {' or '.join(names)}. Check data path, or set format.labels.")
        return sorted(folder.glob("*.json"))

    def entries(self, path: Path) -> Iterator[Any]:
        """Every label with the stem of its file."""
        for file in self.files(path):
            entry = parse(read_json_bytes(file))
            if isinstance(entry, BadRecord):
                entry = BadRecord(f"{file.name}: {entry}", entry.check)
            yield {**entry, "id": file.stem} if isinstance(entry, dict) else entry

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A conversation as it is; a caption as the answer to an instruction."""
        entry = an_object(entry)
        identity = entry["id"]
        image = self.image_name.format(id=identity)
        if "conversations" in entry:
            roles, texts = read_turns(entry, speaker="role", text="content")
            return Record(identity, with_pictures(turns_of(roles, texts), 1), (image,), kind="conversation")
        captions = list_of(entry, "captions", dict)
        if len(captions) != 1:
            raise BadRecord(f"captions has {len(captions)} entries, expected one", "fields")
        turns = ask(pick(self.instructions, identity), text_of(captions[0], "content"))
        return Record(identity, turns, (image,), kind="description", instruction_type="description")
