"""WebDataset tars with captions: the shards of MiniGPT-4's first stage (CC3M, CC12M, SBU, LAION) and most web-scale sets.

Members that share a name up to the first dot are one sample: a picture (jpg, jpeg, png, webp) and its text (``txt``, or
``json`` with a caption). A picture is referred to as ``shard.tar#member`` and read from the tar when it is needed
(:mod:`vlit.data.members`), so nothing is unpacked beforehand. github.com/webdataset/webdataset.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import orjson

from vlit.data.formats._reader import DESCRIBE, RecordFormat, ask, pick
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, kind_of
from vlit.errors import DataError
from vlit.registry import FORMATS

_PICTURES = ("jpg", "jpeg", "png", "webp")
_DROPPED = re.compile(r"[.!\"()*#:;~]")
_MAX_TEXT = 1 << 20
_COMPRESSED = (".tar.gz", ".tgz")


@FORMATS.register("webdataset")
class WebDatasetFormat(RecordFormat):
    """A tar, or a folder of tars, of pictures with captions."""

    type: str = "webdataset"
    caption_key: str = "caption"
    """Key of the caption in `json` members; `txt` members are the caption."""
    clean: Literal["none", "blip"] = "none"
    """`blip`: lower case, without most punctuation, at most 50 words, as MiniGPT-4's first stage does."""
    instructions: tuple[str, ...] = DESCRIBE
    """One of these stands in front of a caption; which one is decided by its id. The `plain` template drops it."""

    def files(self, path: Path) -> list[Path]:
        """The shards of a folder and of the folders in it, in order of their names."""
        if not path.is_dir():
            _refuse_compressed([path])
            return [path]
        _refuse_compressed(sorted(file for ending in _COMPRESSED for file in path.rglob(f"*{ending}")))
        return sorted(path.rglob("*.tar"))

    def entries(self, path: Path) -> Iterator[Any]:
        """The samples of all shards: tar, key, and the members by extension."""
        for shard in self.files(path):
            try:
                with tarfile.open(shard, "r:") as tar:
                    name = shard.relative_to(path).as_posix() if path.is_dir() else shard.name
                    yield from self._samples(tar, name)
            except (OSError, tarfile.TarError) as error:
                raise DataError(f"{shard}: cannot be read as a tar ({error}). Copy or download it again.") from error

    def _samples(self, tar: tarfile.TarFile, shard: str) -> Iterator[dict[str, Any]]:
        held: dict[str, Any] = {}
        for info in tar:
            folder, slash, file = info.name.rpartition("/")
            stem, _, extension = file.partition(".")
            if not info.isreg() or not stem:
                continue
            key, extension = folder + slash + stem, extension.lower()
            if held and held["key"] != key:
                yield held
                held = {}
            held = held or {"id": f"{shard}#{key}", "key": key, "shard": shard}
            if extension in _PICTURES:
                held["picture"] = info.name
            elif extension in ("txt", "json") and info.size <= _MAX_TEXT:
                content = tar.extractfile(info)
                held[extension] = content.read() if content is not None else b""
        if held:
            yield held

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A caption as the answer to an instruction."""
        caption = self._caption(entry)
        if "picture" not in entry:
            raise BadRecord(f"sample {entry['key']!r} has no picture ({', '.join(_PICTURES)})", "image_path")
        turns = ask(pick(self.instructions, entry["id"]), caption)
        image = f"{entry['shard']}#{entry['picture']}"
        return Record(entry["id"], turns, (image,), kind="caption", instruction_type="caption")

    def _caption(self, entry: dict[str, Any]) -> str:
        if "txt" in entry:
            try:
                text = entry["txt"].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise BadRecord(f"txt of sample {entry['key']!r} is not UTF-8 ({error.reason})", "fields") from error
        elif "json" in entry:
            try:
                value = orjson.loads(entry["json"])
            except orjson.JSONDecodeError as error:
                raise BadRecord(f"json of sample {entry['key']!r} is not valid JSON ({error})", "json") from error
            text = value.get(self.caption_key) if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise BadRecord(f"json of sample {entry['key']!r}: {self.caption_key} is {kind_of(text)}", "fields")
        else:
            raise BadRecord(f"sample {entry['key']!r} has no caption (txt, or json with {self.caption_key})", "fields")
        if self.clean == "blip":
            text = " ".join(_DROPPED.sub(" ", text.lower()).split()[:50])
        if not text.strip():
            raise BadRecord(f"{self.caption_key} of sample {entry['key']!r} is empty", "fields")
        return text


def _refuse_compressed(files: list[Path]) -> None:
    """DataError for a compressed tar: a picture in the middle of one cannot be read without all before it."""
    for file in files:
        if file.name.lower().endswith(_COMPRESSED):
            raise DataError(
                f"{file}: tars must be uncompressed. Run gunzip {file.name} in its folder, for all such files."
            )
