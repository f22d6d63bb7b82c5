"""Templates x tokenizers: what is supervised is exactly what the assistant says and what ends it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chat_templates import build_qwen3
from tests.data_fixtures import CHAT_ENDS, QWEN_CHAT, make_spec
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from vlit.config.schema import DataConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import ConfigError
from vlit.registry import TEMPLATES
from vlit.types import IGNORE_INDEX, Sample, TokenizedSample, Turn

TOKENIZERS = ("spm", "spm_legacy", "spm_prepend", "tekken", "clip", "gpt", "chatml", "llama3")
LEADS = {"v0": " ", "v1": " ", "llama2": " ", "minigpt4": " "}
TEXT_ENDS = {"plain": "\n", "v0": "\n###", "minigpt4": "###", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
EOS = {"clip": "<|endoftext|>", "gpt": "<|endoftext|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
SEPARATORS = (
    "</s>", "<s>", "<unk>", "USER:", " ASSISTANT: ", "ASSISTANT:", "###", "\n### Assistant:", "[INST]", "[/INST]",
    "<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|eot_id|>", "<|begin_of_text|>",
    "<<SYS>>", "<|start_header_id|>", "<|endoftext|>", "<|startoftext|>", "<image>", "vlitmark1x", "<0x0A>", "\n", " ", "é",
)  # fmt: skip


def lead_of(template: str, tokenizer: str) -> str:
    """The space that leads an answer. A caption starts a text, where SentencePiece adds one itself."""
    if template == "plain" and tokenizer.startswith("spm"):
        return " "
    if template == "mistral":
        return "" if tokenizer == "tekken" else " "
    if template == "tokenizer":
        return " " if tokenizer.startswith("spm") else ""
    return LEADS.get(template, "")


def end_of(template: str, tokenizer: str) -> str:
    """What ends the last answer, written out by hand."""
    if template == "tokenizer":
        return CHAT_ENDS[tokenizer]
    if (template, tokenizer) == ("plain", "clip"):
        return "<|endoftext|>"  # this tokenizer cannot write a line break
    if template in TEXT_ENDS:
        return TEXT_ENDS[template]
    return (" " if template == "llama2" else "") + EOS.get(tokenizer, "</s>")


def middle_end_of(template: str, tokenizer: str) -> str:
    """What ends an answer that is not the last (only chat templates without special tokens differ)."""
    own = {"gpt": "", "clip": "<|im_end|>\n"}
    return own[tokenizer] if template == "tokenizer" and tokenizer in own else end_of(template, tokenizer)


def make(template: str, path: str, max_tokens: int = 100_000) -> SampleTokenizer:
    return SampleTokenizer(make_spec(path), DataConfig(template=template, max_tokens=max_tokens))


def sample_of(turns: list[Turn]) -> Sample:
    count = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    return Sample("x", "test", tuple(turns), images=tuple(f"{n}.png" for n in range(count)))


def supervised_text(tokenized: TokenizedSample, tokenizer: SampleTokenizer) -> str:
    """Decoded behind an x, because SentencePiece decoders drop a first space."""
    hf = tokenizer.tokenizer
    ids = [int(label) for label in tokenized.labels if label != IGNORE_INDEX]
    before = hf.encode("x", add_special_tokens=False)
    text = hf.decode(before + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text.startswith("x")
    return text[1:]


def normal(text: str, tokenizer: str) -> str:
    """What a tokenizer can give back: CLIP's keeps neither case nor white space."""
    return "".join(unicodedata.normalize("NFC", text).lower().split()) if tokenizer == "clip" else text


def test_there_are_eight_templates_and_more_than_four_tokenizers():
    assert {"plain", "v0", "v1", "llama2", "mistral", "chatml", "llama3", "tokenizer"} <= set(TEMPLATES.names())
    own = {name for name in TEMPLATES.names() if TEMPLATES.get(name).__module__.startswith("vlit.")}  # no test's plugin
    assert set(TEXT_ENDS) | set(LEADS) | {"mistral", "tokenizer"} == own, "add the new template here"


words = st.text(st.characters(codec="utf-8", exclude_characters="▁", exclude_categories=("Cc", "Cs")), max_size=12)
adversarial = st.lists(st.one_of(st.sampled_from(SEPARATORS), words), min_size=1, max_size=8).map("".join)
texts = adversarial.filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("template", sorted({*TEXT_ENDS, *LEADS, "mistral", "tokenizer"}))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(exchanges=st.lists(st.tuples(texts, texts), min_size=1, max_size=2), system=st.none() | texts)
def test_supervised_tokens_decode_to_the_answers_and_their_ends(
    template: str,
    tokenizer_name: str,
    tokenizer_dir: Callable[[str], str],
    exchanges: list[tuple[str, str]],
    system: str | None,
):
    if template == "plain":
        exchanges = [(f"<image>{exchanges[0][0]}", exchanges[0][1])]
    tokenizer = make(template, tokenizer_dir(tokenizer_name))
    system = system and system.replace("<image>", "")
    turns = [Turn("system", system)] if system and system.strip() else []
    for question, answer in exchanges:
        turns += [Turn("user", question), Turn("assistant", answer)]
    tokenized = tokenizer.tokenize(sample_of(turns))

    strips = template == "tokenizer" and (tokenizer_name.startswith("spm") or tokenizer_name == "llama3")
    answers = [answer.strip() if strips else answer for _, answer in exchanges]
    ends = [middle_end_of(template, tokenizer_name)] * (len(answers) - 1) + [end_of(template, tokenizer_name)]
    expected = "".join(
        lead_of(template, tokenizer_name) + answer + end for answer, end in zip(answers, ends, strict=True)
    )
    assert normal(supervised_text(tokenized, tokenizer), tokenizer_name) == normal(expected, tokenizer_name)

    images = sum(question.count("<image>") for question, _ in exchanges)
    assert int(tokenized.is_image.sum()) == 4 * images == 4 * len(tokenized.images)
    assert (tokenized.labels[:-1][tokenized.is_image[1:]] == IGNORE_INDEX).all(), "an image is never predicted"


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("template", sorted({*TEXT_ENDS, *LEADS, "mistral", "tokenizer"}))
def test_the_prompt_of_generation_is_a_prefix_of_the_training_sequence(
    template: str, tokenizer_name: str, tokenizer_dir: Callable[[str], str]
):
    tokenizer = make(template, tokenizer_dir(tokenizer_name))
    turns = [Turn("user", "<image>\nWhat is </s> it? "), Turn("assistant", "A cat.\n"), Turn("user", " And?"),
             Turn("assistant", " A dog")]  # fmt: skip
    for upto in (1, 3) if template != "plain" else (1,):
        sample = sample_of(turns[: upto + 1])
        prompt = tokenizer.prompt(turns[:upto], sample.images)
        trained = tokenizer.tokenize(sample)
        length = len(prompt)
        assert 0 < length < len(trained)
        assert prompt.input_ids.tolist() == trained.input_ids[:length].tolist()
        assert trained.labels[length - 1] == trained.input_ids[length], "the first answer token is learnt"
        stops = tokenizer.stop_sequences()
        tail = [int(label) for label in trained.labels if label != IGNORE_INDEX]
        assert any(tail[-len(stop) :] == stop for stop in stops), (stops, tail[-8:])


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_preview_tokens_cover_the_rendered_text(tokenizer_name: str, tokenizer_dir: Callable[[str], str]):
    tokenizer = make("v1", tokenizer_dir(tokenizer_name))
    sample = sample_of([Turn("user", "Was 日本 </s>? <image>"), Turn("assistant", "Ja, é\n 🙂.")])
    views = tokenizer.explain(sample)
    tokenized = tokenizer.tokenize(sample)
    end = EOS.get(tokenizer_name, "</s>")
    shown = "".join(view.text for view in views)
    assert shown.endswith(f"USER: Was 日本 </s>? <image> ASSISTANT: Ja, é\n 🙂.{end}")
    ids = [view.token_id for view in views for _ in range(view.num_tokens)]
    assert ids == tokenized.input_ids.tolist()
    supervised = [view.supervised for view in views for _ in range(view.num_tokens)]
    assert supervised[1:] == (tokenized.labels[:-1] != IGNORE_INDEX).tolist()


@pytest.mark.parametrize("tokenizer_name", ["spm", "tekken", "chatml", "llama3", "gpt"])
def test_own_chat_template_gives_the_ids_of_apply_chat_template(
    tokenizer_name: str, tokenizer_dir: Callable[[str], str]
):
    tokenizer = make("tokenizer", tokenizer_dir(tokenizer_name))
    turns = [Turn("user", "What is it?"), Turn("assistant", "A cat"), Turn("user", "Sure?"), Turn("assistant", "Yes")]

    def transformers_ids(turns: list[Turn], *, prompt: bool) -> list[int]:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return tokenizer.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
        )

    assert tokenizer.prompt(turns[:1]).input_ids.tolist() == transformers_ids(turns[:1], prompt=True)
    if tokenizer_name in ("spm", "tekken", "chatml"):  # the other two pre-tokenize line breaks by what follows them
        assert tokenizer.tokenize(sample_of(turns)).input_ids.tolist() == transformers_ids(turns, prompt=False)


def test_an_empty_system_text_leaves_the_chat_templates_own_out(
    tokenizer_dir: Callable[[str], str], tmp_path: Path
) -> None:
    turns = [Turn("user", "What is it?"), Turn("assistant", "A cat")]

    def written(path: str, **template: str) -> str:
        data = DataConfig.model_validate({"template": {"type": "tokenizer", **template}})
        return "".join(view.text for view in SampleTokenizer(make_spec(path), data).explain(sample_of(turns)))

    default = "You are a helpful assistant."
    assert default in written(tokenizer_dir("chatml"))
    rest = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat<|im_end|>\n"
    assert written(tokenizer_dir("chatml"), system="") == "<|im_start|>system\n<|im_end|>\n" + rest
    for name in ("spm", "tekken", "gpt", "llama3"):  # these write no system text of their own
        assert written(tokenizer_dir(name), system="") == written(tokenizer_dir(name))
    given = "messages[0]['role'] == 'system' and messages[0]['content']"
    always = QWEN_CHAT.replace("messages[0]['role'] != 'system'", f"not ({given})")
    build_qwen3(tmp_path / "always", always.replace("for m in messages", "for m in messages if m['content']"))
    with pytest.raises(ConfigError, match=r'data.template.system: "".*You are a helpful assistant'):
        written(str(tmp_path / "always"), system="")


def test_a_word_level_vocabulary_never_yields_a_special_token_from_text(tokenizer_dir: Callable[[str], str]):
    tokenizer = make("v1", tokenizer_dir("wordlevel"))
    tokenized = tokenizer.tokenize(sample_of([Turn("user", "is </s> <s> there ?"), Turn("assistant", "yes </s> no")]))
    ids = tokenized.input_ids.tolist()
    assert ids.count(1) == 1
    assert ids.count(2) == 1
    assert tokenizer.tokenizer.decode(ids[-5:]) == "yes <unk> <unk> no </s>"


def test_a_unigram_model_never_yields_a_special_token_from_text(tokenizer_dir: Callable[[str], str]):
    tokenizer = make("v1", tokenizer_dir("unigram"))
    hf = tokenizer.tokenizer
    alone = hf("is </s> it", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert 2 in alone, "the model does yield it when special tokens are merely not looked for"
    tokenized = tokenizer.tokenize(sample_of([Turn("user", "is </s> <s> there?"), Turn("assistant", "it </s> is")]))
    ids = tokenized.input_ids.tolist()
    assert (ids.count(1), ids.count(2), ids[-1]) == (1, 1, 2)
    assert hf.decode([int(label) for label in tokenized.labels if label != IGNORE_INDEX]).endswith("it </s> is</s>")


def test_missing_special_tokens_are_written_as_text_and_listed(tokenizer_dir: Callable[[str], str]):
    assert make("chatml", tokenizer_dir("spm")).written_as_text() == ("<|im_start|>", "<|im_end|>")
    assert make("chatml", tokenizer_dir("chatml")).written_as_text() == ()
