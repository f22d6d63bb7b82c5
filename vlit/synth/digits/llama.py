"""Pretrains the tiny LLaMA of the embedded world on text alone and saves it as an ordinary Hugging Face folder.

The model reads a passage about a random scene and answers questions about it in Vicuna's chat form; some texts are a
passage followed by a caption. It never sees a picture: what visual instruction tuning has to add is the connection.

Shape letters: B texts, T tokens, M supervised positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlit.synth.digits.fitting import fit, fp32_attention
from vlit.synth.digits.passages import (
    STYLES,
    chat_pieces,
    random_things,
    retold_pieces,
    write_conclusions,
    write_passage,
    write_text,
)
from vlit.synth.digits.questions import KINDS
from vlit.synth.digits.tokenizer import LLAMA_SPECIALS, save_tokenizer

Text = list[tuple[str, bool]]
Writer = Callable[[Random], Text]

WIDTH, LAYERS, HEADS, MLP_WIDTH = 128, 4, 4, 384
MAX_TOKENS = 1024
ROPE_THETA = 10_000.0
BATCH, TURNS = 32, 8
RETELLING_SHARE = 0.3
"""Share of the first course on retelling alone: retrieval from the passage forms early where most tokens need it."""
LEARNING_RATE = 6e-3
CONCLUSION_STEPS_SHARE, CONCLUSION_RATE = 0.36, 4e-3
"""The second course, with a schedule of its own: chats about tagged scenes in which conclusions are asked for most."""
BATCHES_SORTED = 4
"""Batches drawn together and cut by length, so that little is spent on padding."""


def build_llama(tokenizer: Any) -> Any:
    """A ``LlamaForCausalLM`` with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.09,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def encode_texts(texts: list[list[tuple[str, bool]]], tokenizer: Any) -> list[tuple[list[int], list[float]]]:
    """Ids and loss weights of each text; an answer weighs the root of its length, so that short ones are learnt too."""
    flat = [piece for text in texts for piece, _ in text]
    ids = iter(tokenizer(flat, add_special_tokens=False).input_ids)
    encoded = []
    for text in texts:
        tokens: list[int] = []
        weights: list[float] = []
        for _, takes_loss in text:
            part = next(ids)
            tokens += part
            weights += [len(part) ** -0.5 if takes_loss else 0.0] * len(part)
        encoded.append((tokens, weights))
    return encoded


def pad_batch(rows: list[tuple[list[int], list[float]]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) padded on the right (harmless under a causal mask) and weights (B, T)."""
    longest = max(len(ids) for ids, _ in rows)
    tokens_BT = torch.full((len(rows), longest), pad_id)
    weights_BT = torch.zeros(len(rows), longest)
    for row, (ids, weights) in enumerate(rows):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        weights_BT[row, : len(weights)] = torch.tensor(weights)
    return tokens_BT, weights_BT


def retelling(rng: Random) -> Text:
    return retold_pieces(random_things(rng), rng)


def everything(rng: Random) -> Text:
    return write_text(rng, turns=TURNS)


def conclusions(rng: Random) -> Text:
    return write_conclusions(rng, turns=TURNS)


def batches(tokenizer: Any, *, rng: Random, phases: Sequence[tuple[int, Writer]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of fresh random texts: for each phase its number of steps, by its writer; the last one goes on."""
    writers = itertools.chain.from_iterable(itertools.repeat(write, steps) for steps, write in phases)
    for step in itertools.count():
        write = next(writers, phases[-1][1])
        if step % BATCHES_SORTED:
            continue
        rows = encode_texts([write(rng) for _ in range(BATCH * BATCHES_SORTED)], tokenizer)
        rows.sort(key=lambda row: len(row[0]))
        parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(parts)
        for part in parts:
            yield pad_batch(part, pad_id=tokenizer.pad_token_id)


def answer_loss(model: Any, tokens_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the supervised tokens; logits are computed at those positions only."""
    hidden_BTD = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    ahead_BT = weights_BT[:, 1:]
    wanted = ahead_BT > 0
    logits_MV = model.lm_head(hidden_BTD[:, :-1][wanted]).float()
    losses_M = F.cross_entropy(logits_MV, tokens_BT[:, 1:][wanted], reduction="none")
    return (losses_M * ahead_BT[wanted]).sum() / ahead_BT.sum()


def pretrain_llama(
    folder: Path, *, steps: int, seed: int = 0, score_size: int = 100, log: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train for ``steps`` batches, save model and tokenizer to ``folder``; return recipe and held-out scores."""
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder, specials=LLAMA_SPECIALS, max_tokens=MAX_TOKENS)
    model = build_llama(tokenizer)
    fp32_attention(model)
    last = round(CONCLUSION_STEPS_SHARE * steps)
    first = steps - last
    told = round(RETELLING_SHARE * first)
    courses = [
        (
            first,
            LEARNING_RATE,
            batches(tokenizer, rng=Random(f"llama:{seed}"), phases=[(told, retelling), (0, everything)]),
        ),
        (last, CONCLUSION_RATE, batches(tokenizer, rng=Random(f"llama:{seed}:last"), phases=[(0, conclusions)])),
    ]
    seconds = 0.0
    for count, rate, stream in courses:

        def loss(step: int, stream: Iterator[tuple[Tensor, Tensor]] = stream) -> Tensor:
            return answer_loss(model, *next(stream))

        seconds += fit(model, loss, steps=count, lr=rate, label="LLaMA", log=log, progress=progress)
    model.save_pretrained(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": {"steps": steps, "batch": BATCH, "turns": TURNS, "lr": LEARNING_RATE, "seed": seed},
        "seconds": round(seconds, 1),
        "scores": text_scores(model, tokenizer, per_kind=score_size),
    }


@torch.no_grad()
def text_scores(model: Any, tokenizer: Any, *, per_kind: int = 100, seed: int = 7) -> dict[str, dict[str, float]]:
    """Exact match of greedy answers to single questions about unseen passages, per style and kind.

    An answer is right when every token is the most likely one given the right tokens before it, which is the same as
    greedy decoding giving exactly the answer and its end.
    """
    rng = Random(f"scores:{seed}")
    scores: dict[str, dict[str, float]] = {}
    for style in STYLES:
        scores[style] = {}
        for kind, ask in KINDS.items():
            texts: list[list[tuple[str, bool]]] = []
            while len(texts) < per_kind:
                things = random_things(rng)
                turn = ask(things, rng)
                if turn is not None:
                    texts.append(chat_pieces(write_passage(things, rng, style=style), [turn]))
            tokens_BT, weights_BT = pad_batch(encode_texts(texts, tokenizer), pad_id=tokenizer.pad_token_id)
            best_BT = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits.argmax(-1)
            right_B = ((best_BT == tokens_BT[:, 1:]) | (weights_BT[:, 1:] == 0)).all(dim=1)
            scores[style][kind] = round(right_B.float().mean().item(), 4)
    return scores
