"""What trained models say about a dataset: losses of a vlit model with and without the picture, CLIP's agreement.

``loss`` is the mean negative log-likelihood of a record's answers, in nats a token: high where a record is hard for the model,
or wrong. ``loss_blind`` is the same behind pictures of the mean colour, and ``gain`` = loss_blind - loss says how much of the
answers comes from the picture (*ours*; comparing with and without it is MMStar's idea, arXiv:2403.20330). ``clip_score`` is
CLIPScore, 2.5 * max(cos, 0) (arXiv:2104.08718), of the answers, cut at the model's text length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlit.data.record import Record
from vlit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlit.answer import Answerer
    from vlit.data.tokenize import TokenizedSample

ROW_TOKENS = 8192
"""Tokens of one forward pass."""
TEXTS_AT_ONCE = 256
CLIP_WEIGHT = 2.5
"""CLIPScore's w, which brings scores of published captions to about 0..1."""
Report = Callable[[int], object]


class LossColumns:
    """Losses of records, filled in row by row of the forward pass."""

    def __init__(self, answerer: Answerer, count: int, report: Report) -> None:
        self.answerer, self.report = answerer, report
        self.columns = {name: np.full(count, np.nan, np.float32) for name in ("loss", "loss_blind")}
        self._row: list[tuple[int, TokenizedSample, list[np.ndarray]]] = []

    def add(self, number: int, sample: TokenizedSample, views: list[np.ndarray]) -> None:
        """Queue a record; a full row is computed first."""
        if self._row and sum(len(held) for _, held, _ in self._row) + len(sample) > ROW_TOKENS:
            self.compute()
        self._row.append((number, sample, views))

    def compute(self) -> None:
        """Compute what is queued: once with the pictures, once with the mean colour in their place."""
        from vlit.data.collate import collate_samples
        from vlit.data.images import mean_colour

        if not self._row:
            return
        model = self.answerer.model
        rows = np.array([number for number, _, _ in self._row])
        views = [view for _, _, held in self._row for view in held]
        batch = collate_samples([s for _, s, _ in self._row], views, image_size=model.spec.image_size)
        self.columns["loss"][rows] = _mean_losses(model, batch)
        if batch.num_images:
            import torch

            colour = torch.tensor(mean_colour(model.spec), dtype=torch.uint8).view(1, 3, 1, 1)
            blank = replace(batch, pixels=colour.expand_as(batch.pixels).contiguous())
            has_picture = np.array([len(held) > 0 for _, _, held in self._row])
            self.columns["loss_blind"][rows[has_picture]] = _mean_losses(model, blank)[has_picture]
        self.report(len(self._row))
        self._row.clear()


def _mean_losses(model: Any, batch: Any) -> np.ndarray:
    """float64 [samples]: mean loss a label token."""
    import torch

    with torch.inference_mode():
        per_position = model(batch.to(model.device)).per_position.double().cpu().numpy()
    owner = batch.sample_of_target.numpy()
    return np.bincount(owner, per_position, batch.num_samples) / np.bincount(owner, minlength=batch.num_samples)


def losses(
    records: Sequence[Record | None], answerer: Answerer, *, root: Path | None, report: Report = lambda n: None
) -> dict[str, np.ndarray]:
    """Columns ``loss``, ``loss_blind``, ``gain``, float32 [records].

    NaN where a record is None, cannot be tokenised, or has an unreadable picture; the last two also without a picture.

    Args:
        answerer: model with the template, image policy and tokenizer it was trained with.
        root: folder of the image paths; None: records with pictures are not measured.
        report: told how many records were done.
    """
    from vlit.data.formats._base import row_of, sample_of
    from vlit.data.images import load_view, resolve_image

    data, spec = answerer.data, answerer.model.spec
    held = LossColumns(answerer, len(records), report)
    for number, record in enumerate(records):
        if record is None or (record.images and root is None):
            continue
        try:
            sample = answerer.tokenizer.tokenize(sample_of(row_of(number, record), "dataset"))
            paths = [resolve_image(name, root or Path()) for name in sample.images]
            views = [load_view(path, policy=data.image_policy, spec=spec, exact=data.exact_pixels) for path in paths]
        except DataError:
            report(1)
            continue
        held.add(number, sample, views)
    held.compute()
    return held.columns | {"gain": held.columns["loss_blind"] - held.columns["loss"]}


def clip_scores(
    records: Sequence[Record | None], folder: str, *, root: Path
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Column ``clip_score``, float32 [records], NaN without exactly one readable picture; and how far embeddings are spread.

    The spread is the mean cosine distance of two different pictures (texts), 0 when all are alike.

    Args:
        folder: a transformers CLIP folder with tokenizer.
        root: folder of the image paths.
    """
    from vlit.data.images import resolve_image
    from vlit.synth.engine.similarity import clip_features

    score = np.full(len(records), np.nan, np.float32)
    usable: list[tuple[int, str, str]] = []
    for number, record in enumerate(records):
        if record is not None and len(record.images) == 1:
            answers = " ".join(turn.text for turn in record.turns if turn.role == "assistant")
            try:
                usable.append((number, str(resolve_image(record.images[0], root)), answers))
            except DataError:
                continue
    if not usable:
        return {"clip_score": score}, {}
    pictures = clip_features([path for _, path, _ in usable], folder)
    known = np.flatnonzero(~np.isnan(pictures).any(axis=1))
    pictures, usable = pictures[known], [usable[row] for row in known]
    if not usable:
        return {"clip_score": score}, {}
    texts = clip_texts([text for _, _, text in usable], folder)
    score[[number for number, _, _ in usable]] = CLIP_WEIGHT * (pictures * texts).sum(axis=1).clip(min=0)
    _, first = np.unique([path for _, path, _ in usable], return_index=True)
    return {"clip_score": score}, {"pictures": spread(pictures[first]), "answers": spread(texts)}


def clip_texts(texts: Sequence[str], folder: str) -> np.ndarray:
    """float32 [texts, width], rows of length 1: text embeddings of a transformers CLIP folder; long texts are cut."""
    import torch
    from transformers import AutoTokenizer

    from vlit.synth.engine.similarity import load_clip

    model: Any = load_clip(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"clip: {folder} holds no tokenizer. Give --clip a whole CLIP folder.") from error
    longest = model.config.text_config.max_position_embeddings
    found: list[np.ndarray] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = list(texts[start : start + TEXTS_AT_ONCE])
        tokens = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            pooled = model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            found.append(torch.nn.functional.normalize(model.text_projection(pooled).float(), dim=-1).numpy())
    return np.concatenate(found)


def spread(rows: np.ndarray) -> float:
    """Mean cosine distance of two different rows of length 1, over all pairs at once; 0 for a single row."""
    count = len(rows)
    if count < 2:
        return 0.0
    total = np.asarray(rows, np.float64).sum(axis=0)
    return float(1 - (total @ total - count) / (count * (count - 1)))
