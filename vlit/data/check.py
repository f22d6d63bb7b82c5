"""A look at the samples before compute is spent: can they be learnt from, and how long are they?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlit.config.schema import DataConfig
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError

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

    def as_dict(self) -> dict[str, Any]:
        """For the data plan."""
        return asdict(self)


def check_supervision(
    mixture: Mixture[RecordSource], tokenizer: SampleTokenizer, data: DataConfig, n: int
) -> SupervisionReport:
    """Tokenize the first ``n`` samples in training order (an epoch at most).

    Raises:
        DataError: more than 1 % of them have no supervised token, or one has under ``data.on_bad_sample: error`` (the
            run would end there anyway); names some of them.
    """
    lengths, supervised, images, truncated = [], 0, 0, 0
    failed: list[str] = []
    count = min(n, mixture.records_per_epoch)
    for position in range(count):
        number, record = mixture.record(position)
        source = mixture.sources[number]
        try:
            sample = tokenizer.tokenize(source.sample(record))
        except DataError as error:
            failed.append(f"{source.place(record)}: {error}")
            continue
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
    )
