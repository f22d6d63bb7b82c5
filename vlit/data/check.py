"""A look at the samples before compute is spent: can they be learnt from, and how long are they?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlit.config.schema import DataConfig
from vlit.data.mixture import Mixture
from vlit.data.share import share_prefixes
from vlit.data.source import RecordSource
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.types import TokenizedSample

MAX_UNSUPERVISED_SHARE = 0.01
_NUM_NAMED = 3


@dataclass(frozen=True)
class SupervisionReport:
    """Statistics of the samples looked at; lengths in tokens, images included."""

    samples: int
    unsupervised: int
    tokens_mean: float
    tokens_p50: float
    tokens_p99: float
    tokens_max: int
    supervised_share: float
    """Supervised tokens among all tokens."""
    truncated_share: float
    """Samples that lost turns or the tail of an answer."""
    images_mean: float
    records_per_image: float
    """Records with an image for each image (or group of images) that is computed; 1 without sharing."""
    shared_share: float
    """Tokens that sharing saves, among all tokens."""
    shared_images: float
    """Image encodings that sharing saves, among all."""

    def as_dict(self) -> dict[str, Any]:
        """For the data plan."""
        return asdict(self)


def check_supervision(
    mixture: Mixture[RecordSource],
    tokenizer: SampleTokenizer,
    data: DataConfig,
    n: int,
    *,
    global_batch: int = 1,
    max_tokens: int = 1 << 30,
) -> SupervisionReport:
    """Tokenize the first ``n`` samples in training order (an epoch at most), and see what sharing saves in their steps.

    Raises:
        DataError: more than 1 % of them have no supervised token, or one has under ``data.on_bad_sample: error`` (the
            run would end there anyway); names some of them.
    """
    lengths, supervised, images, truncated = [], 0, 0, 0
    failed: list[str] = []
    steps: dict[int, list[tuple[TokenizedSample, list[str]]]] = {}
    count = min(n, mixture.records_per_epoch)
    for position in range(count):
        number, record = mixture.record(position)
        source = mixture.sources[number]
        try:
            sample = tokenizer.tokenize(source.sample(record))
            files = [str(source.image_path(image)) for image in sample.images]
        except DataError as error:
            failed.append(f"{source.place(record)}: {error}")
            continue
        steps.setdefault(position // global_batch, []).append((sample, files))
        lengths.append(len(sample))
        supervised += sample.num_label_tokens
        images += len(sample.images)
        truncated += bool(sample.dropped_turns or sample.cut_tokens)
    if failed and (data.on_bad_sample == "error" or len(failed) > MAX_UNSUPERVISED_SHARE * count):
        remedy = (
            ", or set data.on_bad_sample: quarantine (now: error)"
            if data.on_bad_sample == "error"
            else " or the template"
        )
        raise DataError(
            f"{len(failed)} of the first {count} samples give no supervised token: "
            f"{'; '.join(failed[:_NUM_NAMED])}{' …' if len(failed) > _NUM_NAMED else ''}. Fix the records{remedy}."
        )
    tokens = np.asarray(lengths, np.int64)
    trees = []
    if mixture.share_at_most > 1:
        for step in steps.values():
            trees += share_prefixes([sample for sample, _ in step], [files for _, files in step], max_tokens)
    with_image = [tree for tree in trees if tree.images]
    return SupervisionReport(
        samples=count,
        unsupervised=len(failed),
        tokens_mean=float(tokens.mean()),
        tokens_p50=float(np.percentile(tokens, 50)),
        tokens_p99=float(np.percentile(tokens, 99)),
        tokens_max=int(tokens.max()),
        supervised_share=float(supervised / tokens.sum()),
        truncated_share=float(truncated / len(tokens)),
        images_mean=float(images / len(tokens)),
        records_per_image=sum(len(tree.members) for tree in with_image) / len(with_image) if with_image else 1.0,
        shared_share=1 - sum(tree.num_tokens for tree in trees) / int(tokens.sum()) if trees else 0.0,
        shared_images=1 - sum(tree.images for tree in trees) / images if with_image else 0.0,
    )
