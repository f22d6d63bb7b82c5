"""What a dataset is compared with: annotations, evaluation texts. A source that can find nothing is an error, not a pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from vlit.data.json_stream import iter_json_records
from vlit.errors import ConfigError, DataError
from vlit.synth.quality.annotations import REGIONS, Annotations, read_annotations
from vlit.synth.quality.form import without_form
from vlit.synth.quality.ngrams import CONTAMINATION_WORDS, word_hashes
from vlit.synth.quality.sketches import ngram_hashes
from vlit.synth.quality.words import tokens


class Shown(NamedTuple):
    """The pictures of a record, and whether it names regions of them."""

    pictures: list[str]
    regions: bool


def iter_shown(path: Path) -> Iterator[Shown]:
    """What each record shows; records that are no JSON object show nothing."""
    for raw in iter_json_records(path):
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            held = value.get("image") or value.get("images") or []
            names = [held] if isinstance(held, str) else held if isinstance(held, list) else []
            yield Shown([name for name in names if isinstance(name, str)], bool(value.get("regions")))


def match_annotations(
    dataset: Path, sources: list[str], *, images: Path | None = None
) -> tuple[Annotations | None, dict[str, int]]:
    """Annotations of all sources, and the pictures of the dataset that each of them knows (``regions``: records with some).

    Only records of one picture are compared with annotations, so only their pictures count. A source may match nothing when
    another does and its pictures lie in the image folder: a part of the annotated pictures was taken.

    Raises:
        ConfigError: ``regions`` beside a file.
        DataError: a file is not COCO's, or a source matches nothing.
    """
    if REGIONS in sources:
        return _own_regions(dataset, sources)
    read = {source: read_annotations([source]) or Annotations() for source in sources}
    if not read:
        return None, {}
    pictures = {record.pictures[0] for record in iter_shown(dataset) if len(record.pictures) == 1}
    matched = {source: len(pictures & known.things.keys()) for source, known in read.items()}
    for source, known in read.items():
        if not matched[source] and not (any(matched.values()) and _lies_in(images, known)):
            raise DataError(_nothing_matches(source, known, dataset, pictures))
    return _joined(list(read.values())), matched


def _own_regions(dataset: Path, sources: list[str]) -> tuple[Annotations | None, dict[str, int]]:
    if others := [source for source in sources if source != REGIONS]:
        raise ConfigError(
            f"--annotations {REGIONS} takes the place of files, {others[0]} was given too. Leave one out."
        )
    count = sum(record.regions and len(record.pictures) == 1 for record in iter_shown(dataset))
    if not count:
        raise DataError(f"--annotations {REGIONS}: no record of {dataset} has regions of one picture. Give COCO files.")
    return read_annotations([REGIONS]), {REGIONS: count}


def _lies_in(images: Path | None, known: Annotations) -> bool:
    return images is not None and any((images / name).is_file() for name in known.things)


def _nothing_matches(source: str, known: Annotations, dataset: Path, pictures: set[str]) -> str:
    theirs, ours = (f'"{min(names)}"' if names else "none" for names in (known.things.keys(), pictures))
    return (
        f"--annotations {source}: none of its {len(known.things):,} pictures ({theirs}, …) is one of the {len(pictures):,} of "
        f"{dataset} ({ours}, …). FOLDER/=FILE puts FOLDER/ before the file names."
    )


def _joined(parts: list[Annotations]) -> Annotations:
    """One of all, as :func:`read_annotations` joins files: a thing that an earlier one has is not added again."""
    found = parts[0]
    for more in parts[1:]:
        for name, things in more.things.items():
            earlier = found.things.get(name, ())
            found.things[name] = (*earlier, *(thing for thing in things if thing not in earlier))
        found.licences |= more.licences
        for kind, name in more.names.values():
            found.add_name(kind, name)
    return found


def eval_sequences(path: Path) -> np.ndarray:
    """Sorted hashes of all word sequences in the texts of an evaluation file, whatever its keys; what asks for a form of answer
    is left out.

    Raises:
        DataError: it cannot be read, or no text is long enough to be found.
    """
    held: list[np.ndarray] = []
    records = 0
    for raw in _records(path):
        records += 1
        try:
            texts = list(_strings(orjson.loads(raw)))
        except orjson.JSONDecodeError as error:
            raise DataError(f"--eval-texts {path}: not JSON ({error}). Give questions as JSON or JSONL.") from error
        held += [ngram_hashes(word_hashes(tokens(without_form(text))), CONTAMINATION_WORDS) for text in texts]
    if not records:
        raise DataError(f"--eval-texts {path}: no records. Give evaluation questions as JSON or JSONL.")
    found = np.unique(np.concatenate(held)) if held else np.zeros(0, np.uint64)
    if not len(found):
        raise DataError(
            f"--eval-texts {path}: no text of its {records:,} records has {CONTAMINATION_WORDS} words, so none can be found "
            "in a dataset. Leave it out."
        )
    return found


def _records(path: Path) -> Iterator[bytes]:
    try:
        yield from iter_json_records(path)
    except DataError as error:
        raise DataError(f"--eval-texts {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
