"""Pretrains the tiny CLIP of the embedded world and saves it as an ordinary Hugging Face folder.

Contrastive learning (arXiv:2103.00020) on scenes drawn on the fly from the *training* handwriting and captions that
name some attributes of some things. Two deviations, both because a small world repeats itself: a text in the batch
that is also true of another picture is no negative for it, and every caption comes with a near miss (one attribute
changed, arXiv:2210.01936) that its picture must tell apart.

Shape letters: N pictures, C captions, P phrases, Q quadrants, S picture side, D projection width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vlit.synth.digits import phrases, scenes
from vlit.synth.digits.fitting import fit
from vlit.synth.digits.tokenizer import CLIP_SPECIALS, save_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of the original CLIP."""
WIDTH, HEADS, PATCH_PIXELS = 128, 4, 16
MAX_TEXT_TOKENS = 48
BATCH, CAPTIONS_PER_PICTURE, MAX_PHRASES = 128, 2, 2
LEARNING_RATE = 2e-3
EASY_SHARE = 0.25
"""Share of the steps, at the start, on pictures of one digit: first what digits look like, then where they stand."""


def build_clip(tokenizer: Any, *, layers: int = 4, text_layers: int = 2) -> Any:
    """A ``CLIPModel`` with random weights, initialised wide enough to learn in a thousand steps."""
    from transformers import CLIPConfig, CLIPModel

    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "hidden_act": "quick_gelu",
    }
    config = CLIPConfig(
        vision_config={
            **shared,
            "num_hidden_layers": layers,
            "image_size": scenes.SIDE_PIXELS,
            "patch_size": PATCH_PIXELS,
            "projection_dim": WIDTH,
        },
        text_config={
            **shared,
            "num_hidden_layers": text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TEXT_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": WIDTH,
        },
        projection_dim=WIDTH,
        logit_scale_init_value=2.7,
    )
    model = CLIPModel(config)
    model.set_attn_implementation("eager")  # bf16 SDPA is slow on CPU at this size
    with torch.no_grad():
        vision, text = model.vision_model.embeddings, model.text_model.embeddings
        nn.init.normal_(vision.position_embedding.weight, std=0.3)
        nn.init.normal_(vision.patch_embedding.weight, std=0.05)
        nn.init.normal_(text.token_embedding.weight, std=0.2)
        nn.init.normal_(text.position_embedding.weight, std=0.05)
    return model


def augment_ink(masks: NDArray[np.float32], *, rng: np.random.Generator) -> NDArray[np.float32]:
    """Turn, stretch, slant and shift every glyph a little and vary its stroke, (N, Q, 32, 32) -> the same shape."""
    count = masks.shape[0] * masks.shape[1]
    angle, slant = rng.uniform(-0.22, 0.22, count), rng.uniform(-0.2, 0.2, count)
    wide, high = rng.uniform(0.9, 1.15, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[wide * cos, wide * (slant - sin), np.zeros(count)], [high * sin, high * cos, np.zeros(count)]]
    theta = torch.from_numpy(np.array(rows).transpose(2, 0, 1)).float()
    flat = torch.from_numpy(masks).reshape(count, 1, *masks.shape[2:])
    has_ink = flat.amax(dim=(1, 2, 3)) > 0
    grid = F.affine_grid(theta[has_ink], [int(has_ink.sum()), 1, *masks.shape[2:]], align_corners=False)
    warped = torch.zeros_like(flat)
    warped[has_ink] = F.grid_sample(flat[has_ink], grid, align_corners=False)
    gamma = torch.from_numpy(rng.uniform(0.7, 1.4, count)).float().reshape(-1, 1, 1, 1)
    return (warped.clamp(0, 1) ** gamma).reshape(masks.shape).numpy()


def to_pixel_values(pictures_NSS3: NDArray[np.uint8]) -> Tensor:
    """What ``CLIPImageProcessor`` makes of pictures that already have the right size: (N, 3, S, S), normalised."""
    pixels = torch.from_numpy(pictures_NSS3).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def embed_texts(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit vectors (C, D)."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    pooled = model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def embed_pictures(model: Any, pixels_N3SS: Tensor) -> Tensor:
    """Unit vectors (N, D)."""
    pooled = model.vision_model(pixel_values=pixels_N3SS.to(model.dtype)).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def contrastive_loss(logits_CN: Tensor, true_CN: Tensor, owner_C: Tensor) -> Tensor:
    """Symmetric cross-entropy where other true pairs are neither positive nor negative.

    The first ``len(owner_C)`` rows are captions, ``owner_C`` their pictures; further rows are near misses (negatives).
    """
    positives = len(owner_C)
    own = F.one_hot(owner_C, logits_CN.shape[1]).bool()
    hidden_PN = true_CN[:positives] & ~own
    to_picture = F.cross_entropy(logits_CN[:positives].masked_fill(hidden_PN, -1e4), owner_C)
    # For each caption: its own logit against all untrue texts of its picture.
    column = logits_CN.T[owner_C].masked_fill(true_CN.T[owner_C], -1e4)
    own_logit = logits_CN[torch.arange(positives), owner_C]
    to_text = (torch.logsumexp(torch.cat([own_logit[:, None], column], dim=1), dim=1) - own_logit).mean()
    return 0.5 * (to_picture + to_text)


def pretrain_clip(
    folder: Path, *, steps: int, seed: int = 0, score_size: int = 1000, log: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train for ``steps`` batches, save model, image processor and tokenizer; return recipe and scores."""
    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder, specials=CLIP_SPECIALS, max_tokens=MAX_TEXT_TOKENS)
    model = build_clip(tokenizer)
    rng = np.random.default_rng([seed, 100])

    def batch_loss(step: int) -> Tensor:
        easy = step < EASY_SHARE * steps
        layouts = scenes.draw_layouts("train", BATCH, rng=rng, max_digits=1 if easy else 4)
        masks = augment_ink(scenes.ink_masks(layouts), rng=rng)
        pixels = to_pixel_values(scenes.render(layouts, rng=rng, masks=masks))
        drawn = [phrases.draw_captions(layouts, rng=rng, max_phrases=MAX_PHRASES) for _ in range(CAPTIONS_PER_PICTURE)]
        captions = np.concatenate(drawn)
        captions = np.concatenate([captions, phrases.near_misses(captions, rng=rng)])
        texts = embed_texts(model, tokenizer, [phrases.caption_text(caption) for caption in captions])
        logits = model.logit_scale.exp().clamp(max=100) * texts @ embed_pictures(model, pixels).T
        true = torch.from_numpy(phrases.truth(captions, layouts))
        return contrastive_loss(logits, true, torch.arange(BATCH).repeat(CAPTIONS_PER_PICTURE))

    factor = {"logit_scale": 3.0}
    seconds = fit(
        model, batch_loss, steps=steps, lr=LEARNING_RATE, label="CLIP", lr_factor=factor, log=log, progress=progress
    )
    save_clip(model, folder)
    recipe = {"steps": steps, "batch": BATCH, "lr": LEARNING_RATE, "easy_share": EASY_SHARE, "seed": seed}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    scores = zero_shot(model, tokenizer, split="validation", pictures=score_size)
    return {"parameters": parameters, "recipe": recipe, "seconds": round(seconds, 1), "scores": scores}


def save_clip(model: Any, folder: Path) -> None:
    """Weights, configuration and ``CLIPImageProcessor``, as in ``openai/clip-vit-large-patch14-336``."""
    from transformers import CLIPImageProcessor

    side = scenes.SIDE_PIXELS
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Any, *, split: str, pictures: int = 1000, seed: int = 7) -> dict[str, float]:
    """Share of things whose digit, colour or place is the nearest text, the thing's other attributes being given."""
    rng = np.random.default_rng([seed, 200])
    layouts = scenes.draw_layouts(split, pictures, rng=rng)
    images = torch.cat(
        [embed_pictures(model, to_pixel_values(part)) for part in np.array_split(scenes.render(layouts, rng=rng), 4)]
    )
    n, q = np.nonzero(layouts.digits_NQ >= 0)
    known = np.stack([layouts.digits_NQ[n, q], layouts.colours_NQ[n, q], q], axis=1)
    scores = {}
    for attribute, (name, size) in enumerate(zip(("digit", "color", "place"), phrases.SIZES, strict=True)):
        options = np.repeat(known[:, None], size, axis=1)
        options[:, :, attribute] = np.arange(size)
        unique, back = np.unique(options.reshape(-1, 3), axis=0, return_inverse=True)
        texts = embed_texts(model, tokenizer, [phrases.phrase_text(*(int(v) for v in row)) for row in unique])
        similar = (texts[torch.from_numpy(back.reshape(-1))].view(len(n), size, -1) * images[n][:, None]).sum(-1)
        right = similar.argmax(1).numpy() == known[:, attribute]
        scores[name] = round(float(right.mean()), 4)
    return scores
