"""Reasoning in answers under a tokenizer's own chat template: the ids of apply_chat_template, one think block, supervised."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chat_templates import QWEN3_CHAT, build_qwen3
from tests.data_fixtures import QWEN_CHAT, make_spec
from vlit.config.schema import DataConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.types import Sample, Turn

ANSWERS = (
    "<think>\nIt has whiskers.\n</think>\n\nA cat.",
    "<think>It has whiskers.</think>A cat.",
    "<think>\n\n\n It has  whiskers.\nAnd ears. \n\n</think>\n A cat.\n",
    "It has whiskers.\n</think>\n\nA cat.",
    "<think>\n\n</think>\n\nA cat.",
    "<think></think>A cat.",
    "Well. <think>\nIt has whiskers.\n</think>\n\nA cat.",
    "<think>\nIt has whiskers.\n</think>",
    "A cat.",
)
DROPS_REASONING = QWEN_CHAT.replace("m['content']", "m['content'].split('</think>')[-1]")


def tokenizer_of(chat: str, folder: Path) -> SampleTokenizer:
    build_qwen3(folder, chat)
    return SampleTokenizer(make_spec(str(folder)), DataConfig.model_validate({"template": "tokenizer"}))


@pytest.mark.parametrize("chat", [QWEN3_CHAT, QWEN_CHAT], ids=["qwen3", "as_written"])
def test_answers_with_reasoning_get_the_ids_of_apply_chat_template(chat: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(chat, tmp_path)
    for first in ANSWERS:
        for last in ANSWERS:
            turns = (
                Turn("system", "Look."), Turn("user", "What?"), Turn("assistant", first), Turn("user", "Sure?"),
                Turn("assistant", last),
            )  # fmt: skip
            messages = [{"role": turn.role, "content": turn.text} for turn in turns]
            wanted = tokenizer.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            sample = Sample("x", "s", turns)
            if chat == QWEN3_CHAT and last.startswith("Well."):  # words that the template drops
                with pytest.raises(DataError, match="leaves out"):
                    tokenizer.tokenize(sample)
                continue
            assert tokenizer.tokenize(sample).input_ids.tolist() == wanted, (first, last)
            supervised = "".join(view.text for view in tokenizer.explain(sample) if view.supervised)
            ends = (first, last) if chat == QWEN_CHAT else (after_think(first), reasoned(last))
            assert supervised == "".join(f"{end}<|im_end|>" for end in ends)
            if "</think>" not in last:
                prompt = tokenizer.prompt(turns[:-1]).input_ids.tolist()
                assert wanted[: len(prompt)] == prompt


def after_think(answer: str) -> str:
    """What Qwen3's template keeps of an answer that is not the last."""
    return answer.split("</think>")[-1].lstrip("\n") if "</think>" in answer else answer


def reasoned(answer: str) -> str:
    """What Qwen3's template makes of a last answer; its empty think block is no answer."""
    reasoning = answer.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in answer else ""
    return f"<think>\n{reasoning}\n</think>\n\n" * bool(reasoning) + after_think(answer)


def test_a_last_answer_whose_reasoning_the_template_drops_is_a_bad_record(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(DROPS_REASONING, tmp_path)
    turns = (Turn("user", "What?"), Turn("assistant", ANSWERS[0]), Turn("user", "Sure?"), Turn("assistant", "Yes."))
    assert "whiskers" not in "".join(view.text for view in tokenizer.explain(Sample("x", "s", turns)))
    with pytest.raises(DataError, match="leaves out what the last answer says before </think>"):
        tokenizer.tokenize(Sample("x", "s", turns[:2]))
