"""Qwen3's chat template as it is published, without its part for tools, and a tokenizer that brings it along."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from vlit.types import ModelSpec

QWEN3_CHAT = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
                {{- content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers cut a text; line breaks stay together, whatever follows them."""


def build_qwen3(folder: Path, chat: str = QWEN3_CHAT) -> None:
    """The ``chatml`` tokenizer of the data fixtures with Qwen's cuts, Qwen3's think tokens (not flagged as special) and
    ``chat``.
    """
    from tokenizers import AddedToken, Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import AutoTokenizer

    from tests.data_fixtures import build_chatml

    build_chatml(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([
        Split(Regex(QWEN_PATTERN), behavior="isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)


def processor_of(spec: ModelSpec, template: Any) -> tuple[Any, int]:
    """The processor that an export would write for the tokenizer of ``spec``, and the id of its image token."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from vlit.data.load_tokenizer import tokenizer_for
    from vlit.models.interop.chat_template import jinja_template
    from vlit.models.interop.export_hf import add_tokens

    tokenizer = copy.deepcopy(tokenizer_for(spec.tokenizer_path))
    add_tokens(tokenizer, held=1)
    size = {"height": spec.image_size, "width": spec.image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=spec.image_size // 2,
        vision_feature_select_strategy="full",
        chat_template=jinja_template(template, tokenizer),
    )
    return processor, tokenizer.convert_tokens_to_ids("<image>")
