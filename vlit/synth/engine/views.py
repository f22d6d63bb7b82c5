"""The symbolic view of a picture: its captions and its named boxes, all a text-only teacher gets to see.

LLaVA (arXiv:2304.08485 §3) describes a picture to a language model by five captions and by boxes ``category: [x0, y0, x1,
y1]`` normalised to 0..1. Views are read from COCO files (``instances_*.json`` and ``captions_*.json``, either alone too); an
instance may carry ``attributes``, for example a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

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

    def to_item(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {
            "captions": list(self.captions),
            "things": [asdict(t) | {"box": list(t.box)} for t in self.things],
        }

    @classmethod
    def of(cls, item: dict[str, Any]) -> View:
        """From JSON; other keys of the item are left alone."""
        things = tuple(Thing(t["name"], tuple(t["box"]), dict(t.get("attributes", {}))) for t in item.get("things", ()))
        return cls(item["id"], item["image"], tuple(item.get("captions", ())), things)

    def captions_text(self) -> str:
        """One caption a line."""
        return "\n".join(self.captions)

    def boxes_text(self) -> str:
        """One object a line."""
        return "\n".join(f"{thing.phrase}: {thing.box_text()}" for thing in self.things)


def read_views(annotations: Sequence[Path], images: Path) -> list[View]:
    """The views of all pictures of COCO files (or folders of them), by file and picture number.

    Files that speak of the same pictures (``instances_x.json`` and ``captions_x.json``) are joined. Crowd boxes are left out:
    they stand for many things at once. A picture is looked for at ``images/file_name``, then at ``images/x/file_name``.

    Raises:
        DataError: a file is not COCO's, an annotation names an unknown picture or category, or a picture is not there.
    """
    files = [f for path in annotations for f in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise DataError(
            f"{', '.join(map(str, annotations))}: no COCO file (*.json) here. Give files, or the folder of them."
        )
    held: dict[str, dict[str, Any]] = {}
    for path in files:
        _read_file(path, images, held)
    return [
        View(key, row["image"], tuple(row["captions"]), tuple(row["things"]))
        for key, row in held.items()
        if row["seen"]
    ]


def _read_coco(path: Path) -> tuple[dict[Any, Any], list[Any], dict[Any, str]]:
    """(pictures by id, annotations, category names by id) of a COCO file; DataError when it is none."""
    try:
        data = orjson.loads(path.read_bytes())
        pictures = {p["id"]: p for p in data["images"]}
        return pictures, data["annotations"], {c["id"]: str(c["name"]) for c in data.get("categories", [])}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check --annotations.") from error
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a COCO file ({type(error).__name__}: {error}); it needs images and annotations."
        ) from error


def _read_file(path: Path, images: Path, held: dict[str, dict[str, Any]]) -> None:
    pictures, rows, categories = _read_coco(path)
    split = path.stem.split("_", 1)[-1]
    names: dict[Any, str] = {}
    for number, picture in pictures.items():
        relative = _find_picture(images, split, str(picture["file_name"]), path)
        key = names[number] = str(Path(relative).with_suffix("")).replace("/", "-")
        held.setdefault(key, {"image": relative, "captions": [], "things": [], "seen": False})
    for row in rows:
        try:
            target, picture = held[names[row["image_id"]]], pictures[row["image_id"]]
            target["seen"] = True
            if "caption" in row:
                target["captions"].append(" ".join(str(row["caption"]).split()))
            elif not row.get("iscrowd"):
                target["things"].append(_thing(row, categories, picture))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{path}: annotation {row.get('id') if isinstance(row, dict) else row!r} cannot be used "
                f"({type(error).__name__}: {error}). Remove it or complete the file."
            ) from error


def _thing(row: dict[str, Any], categories: dict[Any, str], picture: dict[str, Any]) -> Thing:
    x, y, w, h = (float(edge) for edge in row["bbox"])
    width, height = float(picture["width"]), float(picture["height"])
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    box = tuple(round(min(1.0, max(0.0, edge)), 4) for edge in corners)
    return Thing(categories[row["category_id"]], (box[0], box[1], box[2], box[3]), dict(row.get("attributes", {})))


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
    pictures, rows, _ = _read_coco(path)
    if not pictures or not any("bbox" in row for row in rows[:1]):
        return None
    name = str(next(iter(pictures.values()))["file_name"])
    return _find_picture(images, path.stem.split("_", 1)[-1], name, path).removesuffix(name)


def views_of_folder(images: Path) -> list[View]:
    """Views without annotations: every picture below a folder, by path."""
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"{images}: no picture ({', '.join(sorted(PICTURE_SUFFIXES))}) in this folder. Check --images.")
    relative = [str(p.relative_to(images)) for p in found]
    ids = [str(Path(name).with_suffix("")).replace("/", "-") for name in relative]
    repeated = {i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else set()
    return [View(name.replace("/", "-") if i in repeated else i, name) for i, name in zip(ids, relative, strict=True)]
