"""A tokenizer's own chat template is exported as it was trained: system text, think blocks, images, stop tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.chat_templates import QWEN3_CHAT, build_qwen3, processor_of
from tests.data_fixtures import BUILDERS, QWEN_CHAT, make_spec
from tests.test_interop_parity import TURNS, assemble
from tests.tiny import build_llm, build_tokenizer
from vlit.config.schema import DataConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import ExportError
from vlit.models.interop.export_hf import export_hf
from vlit.registry import TEMPLATES
from vlit.types import Turn

PICTURE = Image.new("RGB", (40, 30), "red")


@pytest.mark.parametrize("system", [None, "", "Be brief."])
@pytest.mark.parametrize("name", ["spm", "spm_legacy", "tekken", "gpt", "chatml", "qwen3", "llama3"])
def test_the_exported_template_writes_the_ids_of_training(name: str, system: str | None, tmp_path: Path) -> None:
    (BUILDERS | {"qwen3": build_qwen3})[name](tmp_path)
    spec = make_spec(str(tmp_path))
    template = TEMPLATES.get("tokenizer")(**({} if system is None else {"system": system}))
    ours = SampleTokenizer(spec, DataConfig.model_validate({"template": template.model_dump()}))
    processor, image_id = processor_of(spec, template)
    own_system = (Turn("system", "You see."), *TURNS[:3])
    for turns in (TURNS[:1], TURNS[:3], own_system):
        wanted = ours.prompt(turns, ["a"])
        first = int(turns[0].role == "system")
        question = turns[first].text.removeprefix("<image>\n")
        parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": question}]
        as_text = [{"role": t.role, "content": t.text} for t in turns]
        as_parts = [*as_text[:first], {"role": "user", "content": parts}, *as_text[first + 1 :]]
        prompt = processor.apply_chat_template(as_text, add_generation_prompt=True)
        assert processor.apply_chat_template(as_parts, add_generation_prompt=True) == prompt
        assert ("Be brief." in prompt) == (system == "Be brief." and not first)
        ids = processor.apply_chat_template(as_parts, add_generation_prompt=True, tokenize=True)
        if name != "llama3" or len(turns) == 1:  # it pre-tokenizes line breaks by the answer that follows them
            assert list(ids[0]) == np.where(wanted.is_image, image_id, wanted.input_ids).tolist()


@pytest.mark.parametrize(("chat", "eos"), [(QWEN_CHAT, "<|endoftext|>"), (QWEN3_CHAT, "<|im_end|>")])
def test_the_exported_model_stops_where_training_ended_answers(chat: str, eos: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

    model = _model_with(chat, eos, tmp_path / "parts")
    template = TEMPLATES.get("tokenizer")()
    export_hf(model, tmp_path / "x", template=template)
    stops = SampleTokenizer(model.spec, DataConfig.model_validate({"template": "tokenizer"})).stop_sequences()
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "x")
    assert [GenerationConfig.from_pretrained(tmp_path / "x").eos_token_id] == [[ids[0] for ids in stops]]
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == stops[0][0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert "<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n" in prompt
    assert prompt.endswith("<think>\n\n</think>\n\n") == (chat == QWEN3_CHAT)
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template == processor.chat_template


def test_a_template_that_reads_its_texts_is_refused(tmp_path: Path) -> None:
    chat = "{{ messages[0]['content'] | length }}" + QWEN_CHAT
    model = _model_with(chat, "<|im_end|>", tmp_path / "parts")
    with pytest.raises(ExportError, match="cannot be exported as it was trained"):
        export_hf(model, tmp_path / "x", template=TEMPLATES.get("tokenizer")())


def _model_with(chat: str, eos: str, folder: Path) -> Any:
    """A tiny model, its parts in ``folder``, whose tokenizer has Qwen's special tokens and the chat template ``chat``."""
    from transformers import AutoTokenizer

    llm = build_llm("llama", folder / "llama")
    build_tokenizer(llm, vocab_size=360, add_bos=False)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = eos, "<|endoftext|>", chat
    tokenizer.save_pretrained(llm)
    return assemble(folder, llm="llama")
