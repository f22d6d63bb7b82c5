"""Ids and labels of ``v1`` and ``plain`` equal LLaVA's published algorithm (LLaVA v1.2.2, transformers 4.37 slow tokenizer).

The reference below is that algorithm written down again from its rules: SentencePiece itself, both settings of the
``legacy`` flag, the prompt built as a string and split at its separators, masks from re-tokenized fragments. It shares no
code with vlit. Its output is also kept in ``tests/golden`` so that a change of either side shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data_fixtures import make_spec
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from vlit.config.schema import DataConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.types import Sample, Turn

IGNORE, IMAGE = -100, -200
GOLDEN = Path(__file__).parent / "golden" / "llava_v1_plain.json"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CONVERSATIONS: list[list[str]] = [
    ["<image>\nWhat is the color of the bus?", "Red"],
    ["<image>\nWhat is the color of the bus?", "Red", "How many people are there?", "There are 12 people, I think."],
    ["Is it a cat?\n<image>", "No.", "Why?", "It barks:\n- loudly\n- often", "Where?", "In the garden (left)."],
    ["Write a haiku about 東京.", "Neon rain falls soft,\nTōkyō hums; a train sighs —\nnight folds into dawn."],
    ["print('hi')  # what?", "It prints `hi`.\n\n```python\nprint('hi')\n```", "Thanks!", "You're welcome!"],
    ["<image>\nProvide a one-sentence caption.\nReference OCR token: SALE, 50%", "A shop sign that says SALE 50% off."],
    ["Compare <image> and <image>.", "The first is larger.", "x = [0.12,0.34,0.56,0.78]?", "Yes: 3.14159 < 22/7"],
    ["<image>\nA question that ends with a space ", "An answer. ", "second", "  two spaces lead"],
]
CAPTIONS = [
    "a dog on a red sofa",
    "the logo of 東京 airlines, 2019.",
    "Two people -- one with a hat!",
    "olive oil, 500 ml",
]


class SlowLlamaTokenizer:
    """What transformers 4.37's Python LlamaTokenizer does with a text."""

    def __init__(self, model: Path, *, legacy: bool) -> None:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as model_pb2

        proto = model_pb2.ModelProto.FromString(model.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.legacy = legacy

    def __call__(self, text: str) -> list[int]:
        if not self.legacy and text:
            text = "▁" + text.replace("▁", " ")
        pieces: list[str] = []
        for number, chunk in enumerate(text.split("</s>")):
            pieces += ["</s>"] * (number > 0)
            pieces += self._chunk(chunk) if chunk else []
        if not self.legacy and len(pieces) > 1 and pieces[0] == "▁" and pieces[1] == "</s>":
            pieces = pieces[1:]
        return [self.sp.bos_id()] + [self.sp.piece_to_id(piece) for piece in pieces]

    def _chunk(self, chunk: str) -> list[str]:
        if self.legacy or not chunk.startswith(("▁", " ")):
            return self.sp.encode(chunk, out_type=str)
        length = len(self.sp.encode("<unk>", out_type=str))
        return self.sp.encode("<unk>" + chunk, out_type=str)[length:]


def tokenizer_image_token(prompt: str, tokenizer: SlowLlamaTokenizer) -> list[int]:
    """Tokenize what stands between the images; one begin token in front."""
    chunks = [tokenizer(chunk) for chunk in prompt.split("<image>")]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [IMAGE, *chunk[1:]]
    return ids


def preprocess_v1(turns: list[str], tokenizer: SlowLlamaTokenizer) -> tuple[list[int], list[int]]:
    """ids and labels (at the token's own position)."""
    prompt = SYSTEM + " "
    for number, text in enumerate(turns):
        prompt += f"USER: {text} " if number % 2 == 0 else f"ASSISTANT: {text}</s>"
    ids = tokenizer_image_token(prompt, tokenizer)
    labels = list(ids)
    done = 1
    labels[0] = IGNORE
    for number, part in enumerate(prompt.split("</s>")):
        if not part:
            break
        question, _ = part.split(" ASSISTANT: ")
        part_length = len(tokenizer_image_token(part, tokenizer))
        question_length = len(tokenizer_image_token(question + " ASSISTANT: ", tokenizer)) - 2
        if number and not tokenizer.legacy:
            part_length -= 1
            question_length -= 1
        labels[done : done + question_length] = [IGNORE] * question_length
        done += part_length
    assert done == len(ids), "LLaVA itself would report a tokenization mismatch"
    return ids, labels


def preprocess_plain(caption: str, tokenizer: SlowLlamaTokenizer) -> tuple[list[int], list[int]]:
    ids = tokenizer_image_token(f"<image>{caption}\n", tokenizer)
    masked = len(tokenizer_image_token("<image>", tokenizer))
    return ids, [IGNORE] * masked + ids[masked:]


def ours(turns: list[str], template: str, path: str) -> tuple[list[int], list[int]]:
    tokenizer = SampleTokenizer(make_spec(path, tokens_per_view=1), DataConfig(template=template))
    roles = [Turn("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns)]
    images = tuple("x.png" for _ in range("".join(turns).count("<image>")))
    tokenized = tokenizer.tokenize(Sample("0", "test", tuple(roles), images))
    ids = [IMAGE if image else int(i) for i, image in zip(tokenized.input_ids, tokenized.is_image, strict=True)]
    return ids, [IGNORE, *(int(label) for label in tokenized.labels[:-1])]


@pytest.fixture(scope="module", params=["spm", "spm_legacy", "spm_prepend"])
def pair(request: pytest.FixtureRequest, tokenizer_dir: Callable[[str], str]) -> tuple[str, SlowLlamaTokenizer, bool]:
    """(folder for vlit, reference tokenizer, legacy flag)."""
    path, legacy = tokenizer_dir(request.param), request.param != "spm"
    model = Path(path) / ("source/tokenizer.model" if request.param == "spm_prepend" else "tokenizer.model")
    return path, SlowLlamaTokenizer(model, legacy=legacy), legacy


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_v1_ids_and_labels_equal_llavas(turns: list[str], pair: tuple[str, SlowLlamaTokenizer, bool]):
    path, reference, _ = pair
    expected_ids, expected_labels = preprocess_v1(turns, reference)
    ids, labels = ours(turns, "v1", path)
    assert ids == expected_ids
    assert labels == expected_labels
    assert sum(label != IGNORE for label in labels) > len(turns) // 2


@pytest.mark.parametrize("caption", CAPTIONS)
def test_plain_ids_and_labels_equal_llavas(caption: str, pair: tuple[str, SlowLlamaTokenizer, bool]):
    path, reference, _ = pair
    assert ours(["Describe it.\n<image>", caption], "plain", path) == preprocess_plain(caption, reference)


def test_merges_of_a_sentencepiece_model_are_in_its_own_order(tokenizer_dir: Callable[[str], str], tmp_path: Path):
    """Runs of spaces (indented code) are where transformers' own conversion differs."""
    from vlit.data.load_tokenizer import tokenizer_for

    path = tokenizer_dir("spm_legacy")
    loaded, reference = tokenizer_for(path), SlowLlamaTokenizer(Path(path) / "tokenizer.model", legacy=True)
    code = Path(__file__).read_text()
    texts = [code[begin : begin + 150].strip().replace("<", "(") for begin in range(0, len(code), 150)]
    texts += ["a" + " " * count + "b" for count in range(1, 24)] + ["-" * count for count in range(1, 24)]
    loaded.save_pretrained(tmp_path)
    saved = tokenizer_for(str(tmp_path))
    for text in texts:
        assert loaded(text)["input_ids"] == reference(text)
        assert saved(text)["input_ids"] == reference(text)
        assert saved(f"a</s>{text}")["input_ids"] == loaded(f"a</s>{text}")["input_ids"]


def reference_rows(reference: SlowLlamaTokenizer) -> list[dict[str, Any]]:
    rows = []
    for turns in CONVERSATIONS:
        ids, labels = preprocess_v1(turns, reference)
        rows.append({"template": "v1", "legacy": reference.legacy, "turns": turns, "ids": ids, "labels": labels})
    for caption in CAPTIONS:
        ids, labels = preprocess_plain(caption, reference)
        turns = ["<image>", caption]
        rows.append({"template": "plain", "legacy": reference.legacy, "turns": turns, "ids": ids, "labels": labels})
    return rows


def test_golden_file_is_reproduced(pair: tuple[str, SlowLlamaTokenizer, bool]):
    path, reference, legacy = pair
    rows = [row for row in json.loads(GOLDEN.read_text()) if row["legacy"] == legacy]
    assert rows == reference_rows(reference)
    assert len(rows) == len(CONVERSATIONS) + len(CAPTIONS)
    for row in rows:
        assert ours(row["turns"], row["template"], path) == (row["ids"], row["labels"])


if __name__ == "__main__":  # writes the golden file: python -m tests.test_data_llava_parity
    import mistral_common

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    rows = [row for legacy in (False, True) for row in reference_rows(SlowLlamaTokenizer(model, legacy=legacy))]
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
