"""The symbolic view of a picture: its captions and its named boxes, all a text-only teacher gets to see.

LLaVA (arXiv:2304.08485 §3) describes a picture to a language model by five captions and by boxes ``category: [x0, y0, x1,
y1]`` normalised to 0..1. Views are read from COCO files (``instances_*.json`` and ``captions_*.json``, either alone too;
``person_keypoints_*.json`` repeats the persons of instances); an instance may carry ``attributes``, for example a colour.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vlit.data.formats.coco import caption_of, category_of, read_coco, region_of, size_of
from vlit.errors import DataError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MIDDLE = (0.4, 0.6)
"""The middle of an axis, as shares of it."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One annotated object; ``box`` = (x0, y0, x1, y1) as shares of width and height."""

    name: str
    box: tuple[float, float, float, float]
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        """Attributes and name, ``red 7``."""
        return " ".join([*self.attributes.values(), self.name])

    @property
    def place(self) -> str:
        """Where the middle of the box is: a corner, a side (``top-middle``), or the center."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        row = "top" if y < MIDDLE[0] else "bottom" if y > MIDDLE[1] else "middle"
        column = "left" if x < MIDDLE[0] else "right" if x > MIDDLE[1] else "middle"
        return "center" if row == column == "middle" else f"{row}-{column}"

    @property
    def area(self) -> float:
        """Share of the picture that the box covers."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def box_text(self) -> str:
        """The box as LLaVA writes it, two decimals."""
        return "[" + ", ".join(f"{edge:.2f}" for edge in self.box) + "]"


@dataclass(frozen=True, slots=True)
class View:
    """One picture; ``image`` is its path below the image folder."""

    id: str
    image: str
    captions: tuple[str, ...] = ()
    things: tuple[Thing, ...] = ()
    license: str = ""
    """Name of the licence, where the annotations say it."""
    crowds: tuple[str, ...] = ()
    """Names that a crowd is annotated for, sorted: they are there, nobody knows how many times."""

    @property
    def countable(self) -> list[Thing]:
        """Things of whose name no more are there than annotated."""
        return [thing for thing in self.things if thing.name not in self.crowds]

    def to_item(self) -> dict[str, Any]:
        """As JSON; ``crowds`` only where there are some."""
        item = asdict(self) | {
            "captions": list(self.captions),
            "things": [asdict(t) | {"box": list(t.box)} for t in self.things],
            "crowds": list(self.crowds),
        }
        return item if self.crowds else {key: value for key, value in item.items() if key != "crowds"}

    @classmethod
    def of(cls, item: dict[str, Any]) -> View:
        """From JSON; other keys of the item are left alone."""
        things = tuple(Thing(t["name"], tuple(t["box"]), dict(t.get("attributes", {}))) for t in item.get("things", ()))
        captions, crowds = tuple(item.get("captions", ())), tuple(item.get("crowds", ()))
        return cls(item["id"], item["image"], captions, things, item.get("license", ""), crowds)

    def captions_text(self) -> str:
        """One caption a line."""
        return "\n".join(self.captions)

    def boxes_text(self) -> str:
        """One object a line."""
        return "\n".join(f"{thing.phrase}: {thing.box_text()}" for thing in self.things)


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Many of a name at once."""

    name: str


@dataclass(slots=True)
class _Picture:
    """What the files read so far say about one picture."""

    image: str
    captions: list[str] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    crowds: set[str] = field(default_factory=set)
    license: str = ""
    taken: set[tuple[Any, Any]] = field(default_factory=set)
    """(id, content) of its annotations, crowds too."""

    def take(self, identity: Any, content: str | Thing | _Crowd) -> bool:
        """Add what an annotation says; False where the annotation was taken before."""
        key = identity, (content.name, content.box) if isinstance(content, Thing) else content
        if identity is not None and key in self.taken:
            return False
        self.taken.add(key)
        if isinstance(content, Thing):
            self.things.append(content)
        elif isinstance(content, _Crowd):
            self.crowds.add(content.name)
        else:
            self.captions.append(content)
        return True


def read_views(annotations: Sequence[Path], images: Path) -> list[View]:
    """The views of all annotated pictures of COCO files (or folders of them), by file and picture number.

    Files that speak of the same pictures (``instances_x.json`` and ``captions_x.json``) are joined. Crowd boxes are left out,
    since they stand for many things at once; their names are kept. An annotation that a file repeats (same id, picture, and
    name with box or caption) is taken once. How many repetitions and how many pictures without annotations were left out is
    said on stderr. A picture is looked for at ``images/file_name``, then at ``images/x/file_name``.

    Raises:
        DataError: a file is not COCO's, an annotation names an unknown picture or category or has a field that cannot be
            used, or a picture is not there.
    """
    files = [f for path in annotations for f in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise DataError(
            f"{', '.join(map(str, annotations))}: no COCO file (*.json) here. Give files, or the folder of them."
        )
    held: dict[str, _Picture] = {}
    for path in files:
        _read_file(path, images, held)
    if bare := sum(not picture.taken for picture in held.values()):
        print(f"{bare:,} of {len(held):,} pictures have no annotation; left out", file=sys.stderr)
    return [
        _view(identity, picture)
        for identity, picture in zip(_ids(list(held)), held.values(), strict=True)
        if picture.taken
    ]


def _view(identity: str, picture: _Picture) -> View:
    captions, things, crowds = tuple(picture.captions), tuple(picture.things), tuple(sorted(picture.crowds))
    return View(identity, picture.image, captions, things, picture.license, crowds)


def _read_file(path: Path, images: Path, held: dict[str, _Picture]) -> None:
    coco, split, again = read_coco(path), _split_of(path), 0
    pictures: dict[Any, _Picture] = {}
    for number, picture in coco.pictures.items():
        relative = _find_picture(images, split, picture["file_name"], path)
        pictures[number] = held.setdefault(str(Path(relative)), _Picture(relative))
        licence = coco.licences.get(picture.get("license"), {}).get("name")
        pictures[number].license = str(licence or pictures[number].license)
    for identity, number, content in coco.each(partial(_content, coco.categories)):
        again += not pictures[number].take(identity, content)
    if again:
        print(
            f"{path}: {again:,} of {len(coco.annotations):,} annotations were read before (same id, picture, box); left out",
            file=sys.stderr,
        )


def _content(
    categories: dict[Any, dict[str, Any]], row: dict[str, Any], picture: dict[str, Any]
) -> str | Thing | _Crowd:
    """A caption, an object, or a crowd."""
    if "caption" in row:
        return caption_of(row)
    if row.get("iscrowd"):
        return _Crowd(category_of(row, categories))
    region = region_of(row, categories, size_of(picture))
    x0, y0, x1, y1 = (round(edge, 4) for edge in region.box)
    return Thing(region.label, (x0, y0, x1, y1), _attributes(row))


def _attributes(row: dict[str, Any]) -> dict[str, str]:
    """What is said of a thing in words; the switches and numbers that annotation tools keep beside them are left alone."""
    given = row.get("attributes")
    return {key: value for key, value in given.items() if isinstance(value, str)} if isinstance(given, dict) else {}


def _split_of(path: Path) -> str:
    """``train2017`` of ``instances_train2017.json`` and of ``person_keypoints_train2017.json``."""
    return re.sub(r"^(person_keypoints|[^_]*)_", "", path.stem)


def _find_picture(images: Path, split: str, name: str, source: Path) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{source}: file_name {name!r} leads out of the image folder. Names are relative to --images.")
    for relative in (name, f"{split}/{name}"):
        if (images / relative).is_file():
            return relative
    raise DataError(
        f"{source}: picture {name!r} is neither at {images / name} nor at {images / split / name}. Check --images."
    )


def picture_prefix(path: Path, images: Path) -> str | None:
    """What stands before the file names of a COCO file with boxes in image paths (often nothing); None when it has no boxes."""
    coco = read_coco(path)
    if not coco.pictures or not any(isinstance(row, dict) and "bbox" in row for row in coco.annotations[:1]):
        return None
    name = next(iter(coco.pictures.values()))["file_name"]
    return _find_picture(images, _split_of(path), name, path).removesuffix(name)


def views_of_folder(images: Path) -> list[View]:
    """Views without annotations: every picture below a folder, by path."""
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"{images}: no picture ({', '.join(sorted(PICTURE_SUFFIXES))}) in this folder. Check --images.")
    relative = [str(p.relative_to(images)) for p in found]
    return [View(identity, name) for identity, name in zip(_ids(relative), relative, strict=True)]


def _ids(images: Sequence[str]) -> list[str]:
    """An id of its own for each relative path: without suffix and with ``-`` for ``/``; with suffix, or as it is, where
    another path could have the same.
    """
    choices = [
        dict.fromkeys((str(Path(name).with_suffix("")).replace("/", "-"), name.replace("/", "-"), name))
        for name in images
    ]
    times = Counter(choice for some in choices for choice in some)
    return [
        next((choice for choice in some if times[choice] == 1), name)
        for name, some in zip(images, choices, strict=True)
    ]
