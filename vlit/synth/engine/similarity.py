"""Which records are alike: TF-IDF of texts, average hash or CLIP features of pictures, and the search for neighbours."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlit.errors import ConfigError, DataError
from vlit.synth.engine.teacher import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

HASH_SIDE = 8
CHUNK = 512
"""Rows compared at once, so that memory does not grow with the square of the records."""


def tfidf(texts: Sequence[str]) -> Any:
    """Sparse rows of length 1; words and pairs of words, sublinear counts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(list(texts))


def average_hash(path: str) -> NDArray[np.float32]:
    """64 signs: which of 8 x 8 grey cells are brighter than their mean; scaled to length 1 (cosine = 1 - Hamming / 32).

    Raises:
        DataError: the picture cannot be decoded.
    """
    from PIL.Image import Resampling

    small = open_picture(path).convert("L").resize((HASH_SIDE, HASH_SIDE), Resampling.BOX)
    grey = np.asarray(small, dtype=np.float32)
    signs = np.where(grey > grey.mean(), 1.0, -1.0).astype(np.float32).reshape(-1)
    return signs / np.float32(HASH_SIDE)


def average_hashes(paths: Sequence[str]) -> NDArray[np.float32]:
    """One row a picture, NaN where it cannot be decoded; each file is read once."""
    held = {path: _hash_or_nan(path) for path in dict.fromkeys(paths)}
    return np.stack([held[path] for path in paths])


def _hash_or_nan(path: str) -> NDArray[np.float32]:
    try:
        return average_hash(path)
    except DataError:
        return np.full(HASH_SIDE**2, np.nan, np.float32)


def load_clip(folder: str) -> Any:
    """A transformers CLIP folder of this machine; nothing is downloaded.

    Raises:
        ConfigError: there is no such folder, or it holds no CLIP model.
    """
    from transformers import CLIPModel

    remedy = "Give --clip (recipe.clip of the recipe otter) a transformers CLIP folder on this machine."
    if not Path(folder).is_dir():
        raise ConfigError(f"clip: {folder} is not a folder. {remedy}")
    try:
        return CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"clip: {folder} cannot be read as a CLIP model ({_one_line(error)}). {remedy}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def clip_features(paths: Sequence[str], folder: str, *, batch: int = 64) -> NDArray[np.float32]:
    """Rows of length 1: image embeddings of a transformers CLIP folder; NaN where a picture cannot be decoded.

    Raises:
        ConfigError: ``folder`` holds no CLIP model.
    """
    import torch
    from transformers import CLIPImageProcessor

    model = load_clip(folder)
    side = model.config.vision_config.image_size
    read = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    different = list(dict.fromkeys(paths))
    held: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(different), batch):
        opened = _opened(different[start : start + batch])
        if not opened:
            continue
        pictures = list(opened.values())
        with torch.inference_mode():
            pooled = model.vision_model(**read(images=pictures, return_tensors="pt")).pooler_output
            features = torch.nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)
        held.update(zip(opened, features.numpy(), strict=True))
    unknown = np.full(model.config.projection_dim, np.nan, np.float32)
    return np.stack([held.get(path, unknown) for path in paths])


def _opened(paths: Sequence[str]) -> dict[str, Image]:
    """The pictures that can be decoded."""
    found: dict[str, Image] = {}
    for path in paths:
        with contextlib.suppress(DataError):
            found[path] = open_picture(path)
    return found


def neighbours(features: Any, *, groups: Sequence[str], owners: Sequence[str], count: int) -> list[list[int]]:
    """For each row the ``count`` most similar rows of its group that belong to another owner, nearest first.

    Equal similarity is resolved by row number, so the result is the same everywhere. Two neighbours never share an owner.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    found: list[list[int]] = [[] for _ in groups]
    for rows in members.values():
        part = features[rows]
        for start in range(0, len(rows), CHUNK):
            block = part[start : start + CHUNK] @ part.T
            dense = np.asarray(block.todense() if hasattr(block, "todense") else block)
            order = np.argsort(-np.round(dense, 6), axis=1, kind="stable")
            for place, line in enumerate(order):
                row = rows[start + place]
                seen = {owners[row]}
                for other in (rows[column] for column in line):
                    if owners[other] not in seen:
                        found[row].append(other)
                        seen.add(owners[other])
                        if len(found[row]) == count:
                            break
    return found
