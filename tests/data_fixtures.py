"""Real tokenizers, saved as Hugging Face folders, and small datasets for the tests of the data floor.

No download: ``mistral_common`` ships a 32k SentencePiece model of LLaMA's kind and tekken, ``open_clip`` ships CLIP's
BPE; the others are trained here on this project's own source text.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlit.types import ModelSpec

QWEN_CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
BARE_CHAT = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
CHAT_ENDS = {
    "spm": " </s>", "spm_legacy": " </s>", "spm_prepend": " </s>", "tekken": "</s>", "gpt": "<|endoftext|>",
    "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "clip": "<|im_end|>\n<|endoftext|>",
}  # fmt: skip
"""What ends the last answer under each tokenizer's own chat template."""


def _save_config(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _mistral_data() -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data"


def _spm(folder: Path, *, legacy: bool) -> None:
    shutil.copy(_mistral_data() / "tokenizer.model.v1", folder / "tokenizer.model")
    _save_config(
        folder, tokenizer_class="LlamaTokenizer", legacy=legacy, add_bos_token=True, add_eos_token=False,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", chat_template=LLAMA2_CHAT,
    )  # fmt: skip


def build_spm(folder: Path) -> None:
    """LLaMA-kind SentencePiece, ``legacy: false`` (Vicuna 1.5)."""
    _spm(folder, legacy=False)


def build_spm_legacy(folder: Path) -> None:
    """The same with ``legacy: true``."""
    _spm(folder, legacy=True)


def build_spm_prepend(folder: Path) -> None:
    """The same as an older ``tokenizer.json``: a Prepend normalizer instead of Metaspace."""
    from vlit.data.load_tokenizer import tokenizer_for

    source = folder / "source"
    source.mkdir()
    _spm(source, legacy=True)
    spec = json.loads(tokenizer_for(str(source)).backend_tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    spec["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    _save_config(
        folder, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>", chat_template=LLAMA2_CHAT,
    )  # fmt: skip


def build_tekken(folder: Path) -> None:
    """Mistral's tekken (a byte-level BPE of Llama-3's kind), its first 32,000 ranks."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tekken = json.loads((_mistral_data() / "tekken_240911.json").read_bytes())
    letters = bytes_to_unicode()
    specials = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:32_000]]
    rank = {token: number for number, token in enumerate(tokens)}
    text = {token: "".join(letters[byte] for byte in token) for token in tokens}
    merges = []
    for token in tokens[256:]:
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(rank[a], rank[b], a, b) for a, b in parts if a in rank and b in rank]
        merges += [(text[a], text[b], rank[token]) for _, _, a, b in sorted(known)]
    merges.sort(key=lambda merge: merge[2])
    vocab = {name: number for number, name in enumerate(specials)} | {text[t]: rank[t] + len(specials) for t in tokens}
    backend = Tokenizer(models.BPE(vocab, [(a, b) for a, b, _ in merges], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tekken["config"]["pattern"]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = MISTRAL_CHAT
    fast.save_pretrained(folder)


def build_clip(folder: Path) -> None:
    """OpenAI CLIP's BPE: lower case, end-of-word marks, end token = padding token."""
    import open_clip
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with gzip.open(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    names = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    fast = CLIPTokenizer(vocab=vocab, merges=merges)
    fast.chat_template = QWEN_CHAT
    fast.save_pretrained(folder)


def _trained_bpe(folder: Path, *, specials: list[str], **names: Any) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    chat, bos = names.pop("chat_template"), names.pop("adds", None)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(__file__).parent.parent.glob("vlit/data/*.py"))
    backend.train_from_iterator((path.read_text() for path in sources), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    fast.chat_template = chat
    fast.save_pretrained(folder)


def build_gpt(folder: Path) -> None:
    """GPT-2's kind: one special token that is begin, end, unknown and padding."""
    end = "<|endoftext|>"
    _trained_bpe(
        folder, specials=[end], bos_token=end, eos_token=end, unk_token=end, pad_token=end, chat_template=BARE_CHAT
    )


def build_chatml(folder: Path) -> None:
    """Qwen's kind: no begin token, more than two additional special tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    _trained_bpe(
        folder, specials=specials, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=specials[1:], chat_template=QWEN_CHAT,
    )  # fmt: skip


def build_llama3(folder: Path) -> None:
    """Llama-3's kind: begin token put in front, header tokens, padding = end."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    _trained_bpe(
        folder, specials=specials, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|eot_id|>",
        adds="<|begin_of_text|>", chat_template=LLAMA3_CHAT,
    )  # fmt: skip


def build_wordlevel(folder: Path) -> None:
    """Whole words only, as the embedded world uses; its ordinary model can produce special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "USER", ":", "a", "red", "cat", "dog", "is", "there", "yes", "no", "?"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def build_unigram(folder: Path) -> None:
    """SentencePiece's other model (T5's kind): special tokens are ordinary candidates of its search."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    sources = sorted(Path(__file__).parent.parent.glob("vlit/data/*.py"))
    backend.train_from_iterator((path.read_text().replace("</s>", "").replace("<s>", "") for path in sources), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "spm": build_spm,
    "spm_legacy": build_spm_legacy,
    "spm_prepend": build_spm_prepend,
    "tekken": build_tekken,
    "clip": build_clip,
    "gpt": build_gpt,
    "chatml": build_chatml,
    "llama3": build_llama3,
    "wordlevel": build_wordlevel,
    "unigram": build_unigram,
}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Name of a builder -> folder with that tokenizer, built once a session."""
    built: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in built:
            folder = tmp_path_factory.mktemp(f"tokenizer-{name}")
            BUILDERS[name](folder)
            built[name] = str(folder)
        return built[name]

    return get


def make_spec(tokenizer_path: str, **changes: Any) -> ModelSpec:
    """CLIP's normalisation, 32 px images, 4 tokens a view."""
    return ModelSpec(
        **{
            "tokenizer_path": tokenizer_path,
            "image_size": 32,
            "image_mean": (0.48145466, 0.4578275, 0.40821073),
            "image_std": (0.26862954, 0.26130258, 0.27577711),
            "tokens_per_view": 4,
            **changes,
        }
    )


def conversation(*texts: str) -> list[dict[str, str]]:
    """LLaVA turns from alternating human and gpt texts."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def write_dataset(folder: Path, count: int, *, name: str = "data.json", images: int = 4) -> Path:
    """LLaVA records of differing lengths, some text-only and some with two images, and their pictures."""
    rng = np.random.default_rng(0)
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        pixels = rng.integers(0, 256, (24 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img" / f"{number}.png")
    records = []
    for number in range(count):
        texts = []
        for _ in range(1 + number % 3):
            texts += [
                f"Question {number} " + "what " * int(rng.integers(1, 12)),
                "Answer " + "yes " * int(rng.integers(1, 9)),
            ]
        record: dict[str, Any] = {"id": f"r{number}", "kind": "short" if number % 2 else "long"}
        if number % 5 != 4:
            paths = [f"img/{number % images}.png"] + ([f"img/{(number + 1) % images}.png"] if number % 7 == 3 else [])
            texts[0] = "<image>\n" * len(paths) + texts[0]
            record["image"] = paths if len(paths) > 1 else paths[0]
        record["conversations"] = conversation(*texts)
        records.append(record)
    path = folder / name
    path.write_text(json.dumps(records))
    return path
