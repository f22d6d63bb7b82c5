"""A byte-level BPE tokenizer of the world's words, saved as an ordinary Hugging Face tokenizer folder.

Merges are learned until every word of the world is one token, "top-left" and the numbers 0 to 36 included; any other
text falls back to smaller pieces, down to bytes, so encoding never fails and decoding is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from vlit.synth.digits.annotations import CAPTION_FORMS
from vlit.synth.digits.passages import ASSISTANT, BOS, EOS, UNKNOWN, USER, write_text
from vlit.synth.digits.questions import COUNTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LLAMA_SPECIALS = {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOS, "pad_token": UNKNOWN}
CLIP_SPECIALS = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
WORD_PATTERN = r" ?\p{L}+(?:-[\p{L}\p{N}]+)*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""A word with its leading space; hyphens bind ("red-7-top-left"), numbers stay whole."""
MAX_VOCABULARY = 4000
CORPUS_TEXTS = 4000


def corpus(*, seed: int = 0, texts: int = CORPUS_TEXTS) -> list[str]:
    """Texts that hold every word of the world: chats and passages about random scenes, all numbers, CLIP's phrases."""
    from vlit.synth.digits.phrases import all_phrases

    rng = Random(f"tokenizer:{seed}")
    lines = [piece for _ in range(texts) for piece, _ in write_text(rng, turns=8)]
    lines += [f"{number} = {number}." for number in range(37)] + [f" {number}" for number in range(37)]
    lines += [USER, ASSISTANT, *COUNTS, *(frame for frame, _ in CAPTION_FORMS), *all_phrases()]
    return [line.replace(BOS, "").replace(EOS, "") for line in lines]


def train_tokenizer(lines: list[str], *, specials: dict[str, str], first: tuple[str, ...]) -> Tokenizer:
    """Learn merges from ``lines``; ``first`` are the special tokens with ids 0, 1, 2 …"""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    bos, eos = specials["bos_token"], specials["eos_token"]
    ends = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos))]
    template = f"{bos} $A {eos}" if specials is CLIP_SPECIALS else f"{bos} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return tokenizer


def save_tokenizer(folder: Path, *, specials: dict[str, str], max_tokens: int, seed: int = 0) -> Any:
    """Train on the world's texts, save to ``folder`` and return it as ``AutoTokenizer`` loads it."""
    from transformers import AutoTokenizer

    # Id 2 is LLaMA's </s>; CLIP's text tower must not end on id 2 (transformers then pools the largest id instead).
    first = ("<|startoftext|>", "<|endoftext|>") if specials is CLIP_SPECIALS else (UNKNOWN, BOS, EOS)
    tokenizer = train_tokenizer(corpus(seed=seed), specials=specials, first=first)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        **specials,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)
