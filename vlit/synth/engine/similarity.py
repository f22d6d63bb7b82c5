"""Which records are alike: TF-IDF of texts, average hash or CLIP features of pictures, and the search for neighbours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

HASH_SIDE = 8
CHUNK = 512
"""Rows compared at once, so that memory does not grow with the square of the records."""


def tfidf(texts: Sequence[str]) -> Any:
    """Sparse rows of length 1; words and pairs of words, sublinear counts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(list(texts))


def average_hash(path: str) -> NDArray[np.float32]:
    """64 signs: which of 8 x 8 grey cells are brighter than their mean; scaled to length 1 (cosine = 1 - Hamming / 32)."""
    from PIL import Image

    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), dtype=np.float32)
    signs = np.where(grey > grey.mean(), 1.0, -1.0).astype(np.float32).reshape(-1)
    return signs / np.float32(HASH_SIDE)


def average_hashes(paths: Sequence[str]) -> NDArray[np.float32]:
    """One row a picture; each file is read once."""
    held = {path: average_hash(path) for path in dict.fromkeys(paths)}
    return np.stack([held[path] for path in paths])


def clip_features(paths: Sequence[str], folder: str, *, batch: int = 64) -> NDArray[np.float32]:
    """Rows of length 1: image embeddings of a transformers CLIP folder."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel

    model: Any = CLIPModel.from_pretrained(folder).eval()
    side = model.config.vision_config.image_size
    read = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    different = list(dict.fromkeys(paths))
    held: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(different), batch):
        part = different[start : start + batch]
        pictures = []
        for path in part:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        with torch.inference_mode():
            pooled = model.vision_model(**read(images=pictures, return_tensors="pt")).pooler_output
            features = torch.nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)
        held.update(zip(part, features.numpy(), strict=True))
    return np.stack([held[path] for path in paths])


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
