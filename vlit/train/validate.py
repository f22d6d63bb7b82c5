"""Held-out loss and a few fixed sample answers during training, appended to ``validation.jsonl``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from vlit.answer import Answerer, Request
from vlit.config.schema import DataConfig, ValidationConfig
from vlit.data.collate import collate_samples, placeholder_row
from vlit.data.images import load_view
from vlit.data.mixture import Mixture
from vlit.data.pack import pack
from vlit.data.source import RecordSource
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.models.assemble import VisionLanguageModel
from vlit.train.distributed import Ranks
from vlit.train.engine import Engine
from vlit.types import ModelSpec, PackedBatch, Sample


class Validator:
    """Holds the same records for a whole stage, this rank its share of them; tokenises and packs them once."""

    def __init__(
        self,
        mixture: Mixture[RecordSource],
        tokenizer: SampleTokenizer,
        data: DataConfig,
        config: ValidationConfig,
        *,
        micro_batch_tokens: int,
        ranks: Ranks,
    ) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        sources = mixture.sources
        in_turn = ((n, source) for n in range(max(len(s) for s in sources)) for source in sources if n < len(source))
        picked = [(source.sample(n), source) for n, source in islice(in_turn, config.max_records)]
        tokenised = []
        for sample, source in picked:
            try:
                tokenised.append(tokenizer.tokenize(sample))
            except DataError as error:
                raise DataError(
                    f'validation data {source.name} (id "{sample.id}"): {error} Fix or remove it.'
                ) from error
        plan = pack([len(t) for t in tokenised], micro_batch_tokens, world_size=ranks.world_size)
        self.batches: list[PackedBatch] = []
        for members in plan[ranks.rank]:
            kept, views = [], []
            for i in members:
                own = self._views(*picked[i], tokenizer.spec, tokenised[i].images, say=True)
                if own is not None:
                    kept.append(tokenised[i])
                    views += own
            self.batches.append(collate_samples(kept, views, image_size=tokenizer.spec.image_size))
        self.shown: list[tuple[Sample, RecordSource]] = []
        for sample, source in picked:
            if sample.images and len(self.shown) < config.sample_generations:
                sound = self._views(sample, source, tokenizer.spec, sample.images, say=False) is not None
                self.shown += [(sample, source)] if sound else []

    def _views(
        self, sample: Sample, source: RecordSource, spec: ModelSpec, images: Sequence[str], *, say: bool
    ) -> list[np.ndarray] | None:
        """The record's pictures; None when one is bad and ``data.on_bad_sample`` leaves such records out, which is said.

        Raises:
            DataError: one is bad, and the policy is ``error``.
        """
        how: dict[str, Any] = {"policy": self.data.image_policy, "spec": spec, "exact": self.data.exact_pixels}
        try:
            return [load_view(source.image_path(name), **how) for name in images]
        except DataError as error:
            place = f'validation data {source.name} (id "{sample.id}"): {str(error).rstrip(".")}'
            if self.data.on_bad_sample == "error":
                raise DataError(
                    f"{place}. Fix or remove it, or set data.on_bad_sample: quarantine (now: error)."
                ) from error
            if say:
                print(f"warning: {place}. It is left out of validation.", file=sys.stderr)
            return None

    def run(self, engine: Engine) -> dict[str, Any]:
        """Mean loss per label token over the held-out records of all ranks, and (on rank 0) the sample answers."""
        model = engine.model
        was_training = model.training
        model.eval()
        summed = torch.zeros(2, dtype=torch.float64, device=model.device)
        with torch.no_grad():
            for batch in self.batches:
                if not batch.num_tokens and not engine.lockstep:
                    continue
                row = batch if batch.num_tokens else placeholder_row(batch)
                summed[0] += engine.loss(row.to(model.device)).per_position.sum()
                summed[1] += batch.num_label_tokens
        total, labels = self.ranks.sum(summed).tolist()
        samples = self._answers(model, together=engine.lockstep)
        model.train(was_training)
        return {"loss": total / labels if labels else math.nan, "label_tokens": int(labels), "samples": samples}

    def _answers(self, model: VisionLanguageModel, *, together: bool) -> list[dict[str, Any]]:
        """Answers to all shown records. Ranks that share the weights generate all ``together``, others deal them out."""
        if together:
            return self._generate(model, self.shown)
        ranks = self.ranks
        dealt = ranks.gather(self._generate(model, self.shown[ranks.rank :: ranks.world_size]))
        return [dealt[number % len(dealt)][number // len(dealt)] for number in range(len(self.shown))]

    def _generate(
        self, model: VisionLanguageModel, shown: Sequence[tuple[Sample, RecordSource]]
    ) -> list[dict[str, Any]]:
        if not shown:
            return []
        requests, rows = [], []
        for sample, source in shown:
            turns = sample.turns
            first_answer = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
            asked = turns[:first_answer]
            count = sum(turn.text.count("<image>") for turn in asked)
            images = tuple(source.image_path(name) for name in sample.images[:count])
            requests.append(Request(asked, images))
            rows.append(
                {
                    "id": sample.id,
                    "image": str(images[0].resolve()) if images else None,
                    "question": asked[-1].text,
                    "answer": turns[first_answer].text,
                }
            )
        answerer = Answerer(model, self.data, max_new_tokens=self.config.max_new_tokens)
        predictions = [answer.text for answer in answerer.answers(requests)]
        return [row | {"prediction": prediction} for row, prediction in zip(rows, predictions, strict=True)]
