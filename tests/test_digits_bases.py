"""The tiny bases: exact tokenizer, true captions, text-only pretraining, folders that load like the real ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlit.errors import ModelError
from vlit.synth.digits import phrases, scenes
from vlit.synth.digits.bases import build_bases, check_bases
from vlit.synth.digits.clip import augment_ink, contrastive_loss, to_pixel_values
from vlit.synth.digits.llama import answer_loss, encode_texts, pad_batch
from vlit.synth.digits.passages import STYLES, chart, chat_pieces, random_things, write_passage, write_text
from vlit.synth.digits.questions import KINDS


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    build_bases(folder, quick=True, progress=False)
    return folder


@pytest.fixture(scope="module")
def tokenizer(quick: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(quick / "llama")


def test_every_word_of_the_world_is_one_token(tokenizer):
    rng = Random(5)
    words = 0
    for _ in range(200):
        for piece, _ in write_text(rng, turns=8):
            bare = piece.replace("<s>", "").replace("</s>", "")
            bare = re.sub(
                r"^(?=[a-z]+-\d)", " ", bare
            )  # a tag counts as a word after a space; opening a text it is split
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(bare, add_special_tokens=False).input_ids)
            marks = re.findall(r"[A-Za-z][A-Za-z0-9-]*|\d+|[.,?:+=]|(?<= )-|\n", bare)
            assert [token.strip("Ġ") or "Ġ" for token in tokens if token != "Ġ"] == [
                m.replace("\n", "Ċ") for m in marks
            ]
            words += len(marks)
    assert words > 5000
    assert all(len(tokenizer(f" {number}", add_special_tokens=False).input_ids) == 1 for number in range(37))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_those_of_llama_and_bos_comes_first(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("USER: hi").input_ids[0] == 1
    assert tokenizer("a</s>b", add_special_tokens=False).input_ids[1] == 2


def test_clip_loads_as_the_original_does_and_takes_pictures_as_in_training(quick):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPVisionModel

    model, processor = AutoModel.from_pretrained(quick / "clip"), AutoImageProcessor.from_pretrained(quick / "clip")
    assert model.config.text_config.eos_token_id == AutoTokenizer.from_pretrained(quick / "clip").eos_token_id != 2
    rng = np.random.default_rng(0)
    pictures = scenes.render(scenes.draw_layouts("train", 3, rng=rng), rng=rng)
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, to_pixel_values(pictures), rtol=1e-4, atol=1e-4)
    tower = CLIPVisionModel.from_pretrained(quick / "clip")
    assert tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].shape == (3, 17, 128)


def test_a_damaged_or_missing_file_is_named(quick, tmp_path):
    check_bases(quick)
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    (copy / "llama" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"llama/config\.json: SHA-256 is"):
        check_bases(copy)
    (copy / "clip" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"clip/model\.safetensors: SHA-256 is missing"):
        check_bases(copy)
    with pytest.raises(ModelError, match="Rebuild the bases"):
        check_bases(tmp_path / "nowhere")


def test_the_same_seed_gives_the_same_weights(quick, tmp_path):
    again = build_bases(tmp_path / "again", quick=True, progress=False)
    first = json.loads((quick / "manifest.json").read_text())
    for part in ("clip", "llama"):
        assert again["bases"][part]["files"] == first["bases"][part]["files"]


def test_truth_of_captions_agrees_with_a_plain_loop():
    rng = np.random.default_rng(3)
    layouts = scenes.draw_layouts("train", 40, rng=rng)
    captions = phrases.draw_captions(layouts, rng=rng)
    captions = np.concatenate([captions, phrases.near_misses(captions, rng=rng)])
    expected = np.zeros((80, 40), dtype=bool)
    for c, caption in enumerate(captions):
        for n in range(40):
            things = [
                (layouts.digits_NQ[n, q], layouts.colours_NQ[n, q], q) for q in range(4) if layouts.digits_NQ[n, q] >= 0
            ]
            named = [phrase for phrase in caption if phrase[0] != phrases.MISSING]
            expected[c, n] = all(
                any(all(p in (-1, v) for p, v in zip(phrase, thing, strict=True)) for thing in things)
                for phrase in named
            )
    found = phrases.truth(captions, layouts)
    assert (found == expected).all()
    assert found[:40].diagonal().all(), "a drawn caption is true of its own picture"
    assert found[40:].diagonal().mean() < 0.3, "near misses are mostly untrue"


def test_the_contrastive_loss_ignores_other_true_pairs_and_equals_a_plain_loop():
    torch.manual_seed(0)
    logits, true = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 3) < 0.3
    owner = torch.tensor([0, 1, 2])
    true[owner, owner] = True
    total = 0.0
    for c in range(3):
        over_pictures = [logits[c, n] for n in range(3) if n == c or not true[c, n]]
        over_texts = [logits[t, c] for t in range(6) if t == c or not true[t, c]]
        for group in (over_pictures, over_texts):
            total += float(torch.logsumexp(torch.stack(group), 0) - logits[c, c])
    assert float(contrastive_loss(logits, true, owner)) == pytest.approx(total / 6, rel=1e-6)


def test_augmented_ink_keeps_empty_quadrants_empty_and_digits_in_place():
    layouts = scenes.draw_layouts("train", 64, rng=np.random.default_rng(0))
    masks = scenes.ink_masks(layouts)
    changed = augment_ink(masks, rng=np.random.default_rng(1))
    empty = layouts.digits_NQ < 0
    assert changed[empty].sum() == 0
    ratio = changed[~empty].sum((1, 2)) / masks[~empty].sum((1, 2))
    assert 0.6 < ratio.min() < ratio.max() < 1.6
    assert not np.allclose(changed, masks)


def test_passages_of_every_style_state_every_thing():
    rng = Random(2)
    for _ in range(50):
        things = random_things(rng)
        for style in STYLES:
            text = write_passage(things, rng, style=style)
            assert all(thing.digit in text and thing.colour in text for thing in things), (style, text)


def test_a_map_has_sixteen_words_and_each_thing_in_its_own_quadrant():
    rng = Random(4)
    for _ in range(50):
        things = random_things(rng)
        rows = np.array(chart(things, rng).split()).reshape(4, 4)
        for number, name in enumerate(scenes.POSITIONS):
            block = set(rows[2 * (number // 2) :][:2, 2 * (number % 2) :][:, :2].ravel().tolist())
            thing = next((thing for thing in things if thing.position == name), None)
            if thing is None:
                assert block == {"-"}
            else:
                tag = f"{thing.colour}-{thing.digit}-{name}"
                assert {tag} <= block <= {tag, "-"}


def test_only_answers_and_their_end_take_loss(tokenizer):
    rng = Random(1)
    things = random_things(rng)
    turns = [KINDS["digit"](things, rng), KINDS["count"](things, rng)]
    pieces = chat_pieces("a passage", [turn for turn in turns if turn])
    (ids, weights), *_ = encode_texts([pieces], tokenizer)
    taught = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight > 0])
    assert taught == "".join(f" {turn.answer}</s>" for turn in turns if turn)


def test_padding_does_not_change_the_loss_of_a_text(quick, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quick / "llama")
    rows = encode_texts([write_text(Random(seed), turns=3) for seed in range(4)], tokenizer)
    parts = [answer_loss(model, *pad_batch([row], pad_id=0)).item() * sum(row[1]) for row in rows]
    together = answer_loss(model, *pad_batch(rows, pad_id=0)).item() * sum(sum(row[1]) for row in rows)
    assert together == pytest.approx(sum(parts), rel=1e-4)
