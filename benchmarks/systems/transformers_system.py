"""transformers: ``LlavaForConditionalGeneration`` under ``Trainer``, right padding, logits at every position.

The steps are those of ``Trainer.train`` itself; a callback lets it start one when the parent asks. The model has bf16
weights and so bf16 optimizer state. (vlit keeps fp32 masters, which costs it time and memory, not speed of products.)
``transformers-autocast`` has fp32 weights under bf16 autocast, the other usual way; it was 3-9 % slower wherever both were
measured (one CPU thread; all cases of ``tiny``, stage 1 of ``small``). Batches are padded, normalised and moved to the
device before the clock starts. Activations are not recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.models import SIZES, Size, text_config, vision_config
from benchmarks.records import CASES, Case, Records, make_records
from benchmarks.systems import Clock, Job
from vlit.models.assemble import VisionLanguageModel
from vlit.types import IGNORE_INDEX

ENDLESS = 10**6
PROJECTOR = "model.multi_modal_projector."


class TrainerSystem:
    """A ``Trainer`` (or one derived from it) with one padded batch."""

    def __init__(self, job: Job, note: str = "") -> None:
        self.job, self.note = job, note
        case, size = CASES[job.case], SIZES[job.size]
        self.autocast = job.system == "transformers-autocast"
        self.model = load_llava(job.parts / "llava", case, torch.float32 if self.autocast else torch.bfloat16)
        records = make_records(case, size, job.num_records)
        self.batch = padded_batch(records, size, self.model.dtype)
        self.positions = self.batch["input_ids"].numel()
        self.padding = self.positions - records.num_tokens
        self.trainer = self.make_trainer()

    def arguments(self, kind: Any = TrainingArguments, **more: Any) -> Any:
        """The step of the comparison: AdamW with a constant rate, clipping at 1."""
        on_gpu = self.job.device == "cuda"
        return kind(
            output_dir=str(self.job.parts / f"{self.job.system}-{self.job.case}"),
            per_device_train_batch_size=self.job.num_records,
            gradient_accumulation_steps=1,
            learning_rate=CASES[self.job.case].lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=self.autocast,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            max_steps=ENDLESS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **more,
        )

    def collate(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The prepared batch, whatever is asked for."""
        return dict(self.batch)

    def make_trainer(self) -> Trainer:
        return Trainer(
            self.model, self.arguments(), data_collator=self.collate, train_dataset=list(range(self.job.num_records))
        )

    def run(self, clock: Clock) -> None:
        from transformers import PrinterCallback

        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(_Turns(clock))
        self.trainer.train()


class _Turns(TrainerCallback):
    """Holds ``Trainer`` back until the parent asks for the next step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.clock.report(logs["loss"], logs["grad_norm"])


def make(job: Job) -> TrainerSystem:
    return TrainerSystem(job)


def write_llava(model: VisionLanguageModel, size: Size, parts: Path) -> None:
    """Save vlit's model as ``parts/llava``, with the whole vision tower of ``parts/clip``."""
    config = LlavaConfig(
        vision_config=vision_config(size), text_config=text_config(size), image_token_index=size.vocabulary - 1,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=size.image_tokens,
        tie_word_embeddings=False,
    )  # fmt: skip
    first, _, second = model.connector.layers
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in _clip(parts / "clip").items()}
    tensors |= {f"{PROJECTOR}linear_1.{name}": tensor for name, tensor in first.state_dict().items()}
    tensors |= {f"{PROJECTOR}linear_2.{name}": tensor for name, tensor in second.state_dict().items()}
    tensors |= {f"model.language_model.{name}": tensor for name, tensor in model.llm.trunk.state_dict().items()}
    tensors["lm_head.weight"] = model.llm.head.weight
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.load_state_dict(tensors, assign=True)
    llava.to(torch.bfloat16).save_pretrained(parts / "llava")


def _clip(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


def load_llava(folder: Path, case: Case, dtype: torch.dtype) -> Any:
    """The model with the case's parts trainable."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    model.config.text_config.use_cache = False
    for name, parameter in model.named_parameters():
        part = "vision" if ".vision_tower." in name else "connector" if name.startswith(PROJECTOR) else "llm"
        parameter.requires_grad_(part in case.tuning)
    return model


def padded_batch(records: Records, size: Size, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest record; labels at the label's own place, as transformers shifts them itself."""
    samples = records.samples
    shape = len(samples), max(len(sample) for sample in samples)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = np.where(sample.is_image, size.vocabulary - 1, sample.input_ids)
        mask[row, : len(sample)] = 1
        labels[row, 1 : len(sample)] = sample.labels[:-1]
    pixels = torch.from_numpy(np.stack([records.pixels[name] for sample in samples for name in sample.images]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    views = ((pixels.float() / 255.0 - mean) / std).to(dtype)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {"pixel_values": views}
