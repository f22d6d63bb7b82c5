"""Writes scenes as a COCO data set: pictures, ``instances_{split}.json`` and ``captions_{split}.json``.

The format is COCO's own (https://cocodataset.org/#format-data): ``images``, ``annotations`` (bbox as x, y, width,
height in pixels; area; category_id; iscrowd), ``categories``, ``info``, ``licenses``. An instance has one more field:
``attributes: {"color": name}``. Everything after this module reads these files and never the scene objects.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlit.synth.digits import scenes

CHUNK = 250
INFO = {
    "description": "Coloured handwritten digits: scikit-learn load_digits (UCI Optical Recognition of Digits)",
    "version": "1",
    "year": 2026,
}
LICENSES = [{"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}]
CATEGORIES = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
CAPTION_FORMS = (
    ("{}.", "a {colour} {digit} at the {position}"),
    ("A picture of {}.", "a {colour} {digit} at the {position}"),
    ("At {}.", "the {position} a {colour} {digit}"),
)


def join_words(parts: list[str]) -> str:
    """``["a", "b", "c"]`` -> ``"a, b and c"``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption_of(things: list[tuple[str, str, str]], form: int) -> str:
    """One sentence that names (digit, colour, position) of every thing, in the given order."""
    frame, phrase = CAPTION_FORMS[form]
    words = join_words([phrase.format(digit=d, colour=c, position=p) for d, c, p in things])
    sentence = frame.format(words)
    return sentence[0].upper() + sentence[1:]


def write_split(root: Path, split: str, count: int, *, seed: int, advance: Any = None) -> None:
    """Write ``count`` pictures to ``root/images/split`` and the two files to ``root/annotations``.

    ``advance(number)`` is called after each chunk of pictures. The result depends on (split, count, seed) alone.
    """
    rng = np.random.default_rng([seed, scenes.SPLITS.index(split)])
    layouts = scenes.draw_layouts(split, count, rng=rng)
    caption_forms = rng.integers(0, len(CAPTION_FORMS), size=(count, 2))
    folder = root / "images" / split
    folder.mkdir(parents=True)
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for start in range(0, count, CHUNK):
            part = layouts.rows(start, min(start + CHUNK, count))
            masks = scenes.ink_masks(part)
            pictures = scenes.render(part, rng=rng, masks=masks)
            boxes, areas = scenes.ink_boxes(masks)
            for row in range(len(part)):
                image_id = start + row + 1
                things = _instances(part, boxes, areas, row, image_id=image_id, first_id=len(instances) + 1)
                instances += things
                for form in caption_forms[start + row]:
                    text = caption_of(_named(part, row), int(form))
                    captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": text})
            list(pool.map(_save_picture, (folder / _file_name(start + n + 1) for n in range(len(part))), pictures))
            if advance is not None:
                advance(len(part))
    side = scenes.SIDE_PIXELS
    images = [
        {"id": n, "file_name": _file_name(n), "width": side, "height": side, "license": 1} for n in range(1, count + 1)
    ]
    common = {"info": INFO, "licenses": LICENSES, "images": images}
    target = root / "annotations"
    target.mkdir(exist_ok=True)
    instance_file = {**common, "annotations": instances, "categories": CATEGORIES}
    (target / f"instances_{split}.json").write_text(json.dumps(instance_file), encoding="utf-8")
    (target / f"captions_{split}.json").write_text(json.dumps({**common, "annotations": captions}), encoding="utf-8")


def _file_name(image_id: int) -> str:
    return f"{image_id:06d}.png"


def _save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, compress_level=1)


def _named(layouts: scenes.Layouts, row: int) -> list[tuple[str, str, str]]:
    return [
        (str(layouts.digits_NQ[row, q]), scenes.COLOUR_NAMES[layouts.colours_NQ[row, q]], position)
        for q, position in enumerate(scenes.POSITIONS)
        if layouts.digits_NQ[row, q] >= 0
    ]


def _instances(
    layouts: scenes.Layouts,
    boxes: NDArray[np.int64],
    areas: NDArray[np.int64],
    row: int,
    *,
    image_id: int,
    first_id: int,
) -> list[dict[str, Any]]:
    quadrants = np.flatnonzero(layouts.digits_NQ[row] >= 0)
    return [
        {
            "id": first_id + n,
            "image_id": image_id,
            "category_id": int(layouts.digits_NQ[row, q]) + 1,
            "bbox": [float(edge) for edge in boxes[row, q]],
            "area": float(areas[row, q]),
            "iscrowd": 0,
            "attributes": {"color": scenes.COLOUR_NAMES[layouts.colours_NQ[row, q]]},
        }
        for n, q in enumerate(quadrants)
    ]
