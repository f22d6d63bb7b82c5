"""Text, tokens and labels that do not fit: tokenizers of other models, nothing to learn, too long, mixed pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batches import Example, packed, random_example
from tests.data_fixtures import conversation, make_spec
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from tests.test_models_assembly import assemble, examples, gradients
from tests.tiny import IMAGE_SIZE, NUM_PATCHES, VOCAB_SIZE, build_encoder, build_llm, build_tokenizer
from vlit.config.schema import DataConfig, DataSource, ModelConfig, TuningConfig
from vlit.data.check import check_supervision
from vlit.data.mixture import Mixture
from vlit.data.source import open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError, ModelError
from vlit.models.assemble import model_spec
from vlit.models.llms.hf import HFLanguageModelConfig
from vlit.models.tuning import apply_tuning
from vlit.types import IGNORE_INDEX, Sample, Turn

# A tokenizer of another model


def spec_with(tiny_dir: Path, tokenizer: Path) -> Any:
    config = {
        "encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip"))},
        "connector": "mlp",
        "llm": {"type": "hf", "path": str(build_llm("llama", tiny_dir / "llama")), "tokenizer": str(tokenizer)},
    }
    return model_spec(ModelConfig.model_validate(config))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_with_both_sizes_and_the_key(
    tiny_dir: Path, tmp_path: Path, tokenizer_dir: Callable[[str], str]
):
    spec = spec_with(tiny_dir, Path(tokenizer_dir("chatml")))
    assert spec.vocab_size == VOCAB_SIZE
    with pytest.raises(
        ModelError, match=rf"(?s)model\.llm\.tokenizer .*needs 1\d\d\d embeddings.*has {VOCAB_SIZE} \(its vocab"
    ):
        SampleTokenizer(spec, DataConfig()).stop_sequences()


def full_tokenizer(folder: Path) -> Any:
    """A tokenizer of exactly as many tokens as the tiny models have embeddings: the next one added is one too many."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build_tokenizer(folder))
    fill = [f"<fill{n}>" for n in range(VOCAB_SIZE - len(tokenizer))]
    tokenizer.add_special_tokens({"additional_special_tokens": fill})
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


def test_a_token_added_without_resizing_the_model_is_refused_only_if_something_writes_it(
    tiny_dir: Path, tmp_path: Path
):
    sample = Sample("x", "s", (Turn("user", "Is <pad> a <|im_end|>?"), Turn("assistant", "Yes")))

    def tokens(name: str, template: str, change: Callable[[Any], Any]) -> Any:
        tokenizer = full_tokenizer(tmp_path / name)
        change(tokenizer)
        tokenizer.save_pretrained(tmp_path / name)
        return SampleTokenizer(spec_with(tiny_dir, tmp_path / name), DataConfig(template=template)).tokenize(sample)

    assert tokens("full", "v1", lambda tokenizer: None).input_ids.max() < VOCAB_SIZE
    # a pad token of its own: a habit of training scripts; nothing here ever pads
    pad = tokens("pad", "v1", lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}))
    assert pad.input_ids.max() < VOCAB_SIZE
    with pytest.raises(
        ModelError, match=rf"'sevenfold' has the id {VOCAB_SIZE}, so it needs {VOCAB_SIZE + 1} embeddings"
    ):
        tokens("word", "v1", lambda tokenizer: tokenizer.add_tokens(["sevenfold"]))  # an ordinary word: texts give it
    chat = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokens("chat", "v1", lambda tokenizer: tokenizer.add_special_tokens(chat))
    with pytest.raises(
        ModelError, match=rf"data\.template chatml: its token '<\|im_start\|>' has the id {VOCAB_SIZE} "
    ):
        tokens("chat2", "chatml", lambda tokenizer: tokenizer.add_special_tokens(chat))


def test_neither_an_image_token_nor_a_pad_token_is_needed(tiny_dir: Path, tmp_path: Path):
    folder = build_tokenizer(tmp_path / "bare")
    tokenizer = SampleTokenizer(spec_with(tiny_dir, folder), DataConfig(template="v1"))
    assert tokenizer.tokenizer.pad_token is None
    assert "<image>" not in tokenizer.tokenizer.get_vocab()
    sample = Sample("x", "s", (Turn("user", "<image>\nWhat?"), Turn("assistant", "A seven")), ("a.png",))
    tokens = tokenizer.tokenize(sample)
    assert int(tokens.is_image.sum()) == tokenizer.spec.tokens_per_view == 16
    assert tokens.num_label_tokens > 1


def test_weights_with_other_sizes_than_their_configuration_are_refused_by_name(tiny_dir: Path, tmp_path: Path):
    """A model whose embeddings were resized, with the old config.json beside it."""
    folder = tmp_path / "resized"
    shutil.copytree(build_llm("llama", tiny_dir / "llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE + 64}))
    with pytest.raises(ModelError, match=r'model\.llm\.path ".*resized"') as caught:
        HFLanguageModelConfig(path=str(folder)).build(dtype=torch.float32)
    assert "\n" not in str(caught.value)


# What is learnt


def test_the_labels_of_every_template_decode_to_the_answers_before_any_step(tokenizer_dir: Callable[[str], str]):
    """What a start-up self-test would print; `vlit preview` shows the same."""
    turns = (
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "A cat."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    )
    for template in ("v0", "v1", "llama2", "mistral", "chatml", "llama3", "tokenizer"):
        tokenizer = SampleTokenizer(make_spec(tokenizer_dir("llama3")), DataConfig(template=template))
        tokens = tokenizer.tokenize(Sample("x", "s", turns, ("a.png",)))
        learnt = tokenizer.tokenizer.decode([label for label in tokens.labels if label != IGNORE_INDEX])
        assert "A cat." in learnt, template
        assert "Yes." in learnt, template
        assert "What" not in learnt, template
        assert "Sure" not in learnt, template


def mixture_of(tmp_path: Path, records: list[dict[str, Any]], data: DataConfig) -> Mixture[Any]:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return Mixture([open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)], seed=0)


def test_a_dataset_of_which_nothing_can_be_learnt_is_refused_before_the_first_step(
    tmp_path: Path, tokenizer_dir: Callable[[str], str]
):
    records = [{"id": n, "conversations": conversation("why " * 90, "so")} for n in range(20)]
    data = DataConfig(template="llama3", cache_dir=str(tmp_path), max_tokens=40, on_bad_sample="quarantine")
    tokenizer = SampleTokenizer(make_spec(tokenizer_dir("llama3")), data)
    with pytest.raises(
        DataError, match=r"20 of the first 20 samples give no supervised token: records\.json#\d+ \(id \"\d+\""
    ):
        check_supervision(mixture_of(tmp_path, records, data), tokenizer, data, 512)


def masked(example: Example) -> Example:
    return Example(example.ids, torch.full_like(example.labels, IGNORE_INDEX), example.pixels)


def test_a_micro_batch_without_a_label_adds_exactly_nothing_and_no_nan(tiny_dir: Path):
    model = assemble(tiny_dir).eval()
    apply_tuning(model, TuningConfig(vision="full", connector="full", llm="full"))
    samples = examples(model)
    learnt, silent = packed(samples[:2]), packed([masked(sample) for sample in samples[2:]])
    assert silent.num_label_tokens == 0
    assert silent.num_images > 0
    assert float(model(silent).total.detach()) == 0.0
    alone, together = gradients(model, [learnt]), gradients(model, [learnt, silent])
    assert len(alone) > 20
    assert together.keys() == alone.keys()
    for name in alone:
        assert torch.isfinite(together[name]).all(), name
        assert torch.equal(together[name], alone[name]), name


# Mixed pictures


@pytest.mark.parametrize("order", [(0, 1, 3), (3, 0, 1), (1, 3, 0)])
def test_samples_of_no_one_and_three_pictures_in_a_row_see_their_own(tiny_dir: Path, order: tuple[int, ...]):
    model = assemble(tiny_dir).eval()
    sizes: dict[str, int] = {"tokens_per_view": NUM_PATCHES, "image_size": IMAGE_SIZE, "vocabulary": VOCAB_SIZE}
    made = {n: random_example(tokens=9 + n, images=n, seed=n, **sizes) for n in order}
    samples = [made[images] for images in order]
    with torch.no_grad():
        together = model.logits(packed(samples)).split([len(sample.ids) for sample in samples])
        for sample, found in zip(samples, together, strict=True):
            torch.testing.assert_close(found, model.logits(packed([sample])), rtol=1e-5, atol=1e-5)
        features = model.encode_images(packed(samples).pixels).tokens
        apart = [model.encode_images(sample.pixels).tokens for sample in samples if len(sample.pixels)]
    torch.testing.assert_close(features, torch.cat(apart), rtol=1e-5, atol=1e-6)


def test_pixels_of_one_sample_do_not_reach_another(tiny_dir: Path):
    model = assemble(tiny_dir).eval()
    samples = examples(model)
    changed = [replace(samples[0], pixels=255 - samples[0].pixels), *samples[1:]]
    lengths = [len(sample.ids) for sample in samples]
    with torch.no_grad():
        before, after = model.logits(packed(samples)).split(lengths), model.logits(packed(changed)).split(lengths)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


# Steps cut in other ways


def test_one_step_in_one_in_eight_and_in_ragged_micro_batches_has_the_same_gradient(tiny_dir: Path):
    model = assemble(tiny_dir).eval()
    apply_tuning(model, TuningConfig(vision="full", connector="full", llm="full"))
    samples = examples(model) * 2
    whole = gradients(model, [packed(samples)])
    cuts = {"eight of one": [1] * 8, "ragged": [3, 3, 2], "a last one alone": [7, 1]}
    assert len(whole) > 20
    for name, sizes in cuts.items():
        rows, begin = [], 0
        for size in sizes:
            rows.append(packed(samples[begin : begin + size]))
            begin += size
        found = gradients(model, rows)
        for weight in whole:
            torch.testing.assert_close(found[weight], whole[weight], rtol=1e-4, atol=2e-6, msg=f"{name}: {weight}")
