"""TRL's ``SFTTrainer`` on the model and the padded batch of :mod:`benchmarks.systems.transformers_system`.

Its own image path tokenizes text and decodes pictures, so it cannot take given token ids. The batch therefore comes from a
``data_collator``, which it accepts for any dataset; loss, metrics and step are its own. Packing and padding-free rows are
not open to us: it refuses both for datasets with images. Gradient checkpointing, on by default, is off as for the others. Its
chunked output head takes supervised positions only where Triton runs; elsewhere it takes all, and every chunk twice.
"""

from __future__ import annotations

from typing import Any

import trl

from benchmarks.models import SIZES, Size
from benchmarks.systems import Job
from benchmarks.systems.transformers_system import TrainerSystem

NOTE = (
    "SFTTrainer with the ids from a data_collator; it refuses packing and padding_free for images, and its chunked head "
    "takes all positions on a CPU"
)


class TrlSystem(TrainerSystem):
    """``SFTTrainer`` in place of ``Trainer``."""

    def make_trainer(self) -> Any:
        from datasets import Dataset

        images = Dataset.from_dict({"images": list(range(self.job.num_records))})
        return trl.SFTTrainer(
            self.model,
            self.arguments(trl.SFTConfig, max_length=None, gradient_checkpointing=False),
            data_collator=self.collate,
            train_dataset=images,
            processing_class=_processor(SIZES[self.job.size]),
        )


def make(job: Job) -> TrlSystem:
    return TrlSystem(job, NOTE)


def _processor(size: Size) -> Any:
    """SFTTrainer takes a model for a vision-language one when it comes with a processor; nothing is processed with it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": size.vocabulary - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>",
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(), tokenizer=tokenizer, patch_size=size.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip
