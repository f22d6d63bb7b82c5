"""One image, many conversations: a tree is exactly its records, in loss, gradients and isolation; and nothing is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import IMAGE_SIZE, NUM_PATCHES, build_encoder, build_llm
from vlit.config.schema import ModelConfig, TuningConfig
from vlit.data.collate import collate, collate_samples
from vlit.data.mixture import Mixture
from vlit.data.share import share_prefixes
from vlit.kernels.attention.proof import proves_right
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.tuning import apply_tuning
from vlit.types import IGNORE_INDEX, NO_PARENT, PackedBatch, TokenizedSample

VOCABULARY = 300


def assemble(tiny_dir: Path, llm: str = "llama_gqa", connector: str = "mlp") -> VisionLanguageModel:
    config = ModelConfig.model_validate(
        {
            "encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip"))},
            "connector": {"type": connector} | ({"num_queries": NUM_PATCHES} if connector == "qformer" else {}),
            "llm": {"type": "hf", "path": str(build_llm(llm, tiny_dir / llm))},
        }
    )
    return build_model(config, dtype=torch.float32)


def record(number: int, *, header: int, image: str | None, text: int, tail_image: str | None = None) -> TokenizedSample:
    """Header tokens that depend on their count alone, an image, then ``text`` tokens of the record's own."""
    own = np.random.default_rng(number)
    pieces: list[tuple[np.ndarray, bool]] = [(np.arange(3, 3 + header), False)]
    if image is not None:
        pieces.append((np.zeros(NUM_PATCHES, np.int64), True))
    pieces.append((own.integers(3, VOCABULARY, text), False))
    if tail_image is not None:
        pieces += [(np.zeros(NUM_PATCHES, np.int64), True), (own.integers(3, VOCABULARY, 3), False)]
    ids = np.concatenate([piece for piece, _ in pieces])
    is_image = np.concatenate([np.full(len(piece), flag) for piece, flag in pieces])
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    chosen = np.flatnonzero(~is_image[1:] & (own.random(len(ids) - 1) < 0.5))
    chosen = np.union1d(chosen, [len(ids) - 2])  # the last token is always predicted
    labels[chosen] = ids[chosen + 1]
    images = tuple(name for name in (image, tail_image) if name is not None)
    return TokenizedSample(str(number), "test", ids, labels, is_image, images)


def view(name: str) -> np.ndarray:
    rng = np.random.default_rng(sum(name.encode()))
    return rng.integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8)


def shared_batch(samples: list[TokenizedSample], max_tokens: int = 10_000) -> PackedBatch:
    trees = share_prefixes(samples, [sample.images for sample in samples], max_tokens)
    pixels: list[np.ndarray] = []
    for tree in trees:
        first = samples[tree.members[0]]
        pixels += [view(name) for name in first.images[: tree.prefix_images]]
        pixels += [view(name) for n in tree.members for name in samples[n].images[tree.prefix_images :]]
    return collate(trees, samples, pixels)


def separate_batches(samples: list[TokenizedSample]) -> list[PackedBatch]:
    return [collate_samples([sample], [view(name) for name in sample.images]) for sample in samples]


def gradients(model: VisionLanguageModel, batches: list[PackedBatch]) -> tuple[dict[str, Tensor], float]:
    model.zero_grad(set_to_none=True)
    labels = sum(batch.num_label_tokens for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(batch).total / labels
        loss.backward()
        total += float(loss.detach())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, total


def assert_equal_gradients(model: VisionLanguageModel, samples: list[TokenizedSample]) -> PackedBatch:
    batch = shared_batch(samples)
    together, loss = gradients(model, [batch])
    apart, expected = gradients(model, separate_batches(samples))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert together.keys() == apart.keys()
    assert len(together) >= 4
    whole = torch.stack([grad.norm() for grad in apart.values()]).norm()
    for name, wanted in apart.items():
        if not name.startswith("llm") and name.endswith(("k_proj.bias", "key.bias")):
            # softmax ignores it: its gradient is 0, and what is computed is rounding
            assert max(wanted.norm(), together[name].norm()) < 1e-6 * whole
            continue
        error = float((together[name] - wanted).norm() / wanted.norm().clamp(min=1e-12))
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    return batch


def family(count: int, *, header: int = 4, image: str = "a", start: int = 0) -> list[TokenizedSample]:
    return [record(start + n, header=header, image=image, text=5 + 3 * n) for n in range(count)]


TUNINGS = {
    "align": TuningConfig(),
    "full": TuningConfig(vision="full", llm="full"),
    "lora": TuningConfig.model_validate({"llm": {"mode": "lora", "rank": 4, "alpha": 8}}),
}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("llm", ["llama", "llama_gqa"])
def test_a_tree_gives_the_gradients_of_separate_records(
    llm: str, tuning: str, checkpointing: str, tiny_dir: Path
) -> None:
    model = assemble(tiny_dir, llm)
    apply_tuning(model, TUNINGS[tuning])
    if tuning == "lora":  # B starts at zero, which would hide A's gradient
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=generator)
    model.set_gradient_checkpointing(checkpointing)
    model.train()
    text_only = record(90, header=2, image=None, text=9)
    batch = assert_equal_gradients(model, [*family(4), text_only, *family(2, image="b", start=40)])
    assert batch.num_images == 2
    assert batch.num_sample_tokens - batch.num_tokens == 3 * (4 + NUM_PATCHES) + (4 + NUM_PATCHES)


@pytest.mark.parametrize(
    ("llm", "connector"), [("mistral", "mlp"), ("gemma2", "linear"), ("qwen3", "qformer"), ("phi", "mlp")]
)
def test_other_decoders_and_connectors_share_exactly(llm: str, connector: str, tiny_dir: Path) -> None:
    """Sliding windows, soft caps and learned queries included."""
    model = assemble(tiny_dir, llm, connector)
    apply_tuning(model, TuningConfig(llm="full"))
    model.eval()
    assert model.spec.tokens_per_view == NUM_PATCHES
    assert_equal_gradients(model, family(3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from(["a", "b", None]), st.lists(st.integers(2, 20), min_size=1, max_size=5)
        ),
        min_size=1,
        max_size=4,
    ),
    tail=st.booleans(),
)
def test_random_trees_give_the_gradients_of_separate_records(
    tiny_dir: Path, groups: list[tuple[int, str | None, list[int]]], tail: bool
) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(llm="full"))
    model.train()
    samples = [
        record(100 * g + n, header=header, image=image, text=text, tail_image="c" if tail and n % 2 else None)
        for g, (header, image, texts) in enumerate(groups)
        for n, text in enumerate(texts)
    ]
    assert_equal_gradients(model, samples)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_bf16_on_this_machine_gives_the_gradients_of_fp32_within_its_noise(
    policy: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiled attention is asked for the first time inside whatever region the policy makes."""
    proves_right.cache_clear()
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(llm="full"))
    batch = shared_batch([*family(4), record(90, header=2, image=None, text=9)])
    exact, _ = gradients(model, [batch])
    model.to(torch.bfloat16)
    model.set_gradient_checkpointing(policy)
    model.train()
    rounded, _ = gradients(model, [batch])
    assert capsys.readouterr().err.count("is not used on this machine") == 0
    assert rounded.keys() == exact.keys()
    for name, wanted in exact.items():
        cosine = torch.nn.functional.cosine_similarity(rounded[name].float().flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.99, f"{name}: {cosine}"


def test_perturbing_one_conversation_never_changes_another(tiny_dir: Path) -> None:
    model = assemble(tiny_dir).eval()
    samples = family(3)
    changed = family(3)
    flipped = changed[1].input_ids.copy()
    flipped[-8:] = flipped[-8:][::-1]
    changed[1] = record(1, header=4, image="a", text=8)
    changed[1].input_ids[:] = flipped
    before, after = shared_batch(samples), shared_batch(changed)
    assert [s.parent for s in before.segments] == [NO_PARENT, 0, 0, 0]
    with torch.no_grad():
        logits = [model.logits(batch).split([s.length for s in batch.segments]) for batch in (before, after)]
    differs = [float((a - b).abs().max()) for a, b in zip(*logits, strict=True)]
    assert differs[2] > 1e-4
    assert [differs[i] for i in (0, 1, 3)] == [0.0, 0.0, 0.0]


def test_what_is_shared_is_the_longest_common_beginning_and_never_part_of_an_image() -> None:
    samples = [
        record(0, header=4, image="a", text=6),
        record(1, header=4, image="a", text=9),
        record(2, header=3, image="a", text=9),  # another header: shares nothing
        record(3, header=4, image="b", text=9),  # another image
        record(4, header=4, image=None, text=9),
        record(5, header=4, image="a", text=6),
    ]
    samples[5].input_ids[:-2] = samples[0].input_ids[:-2]  # the same question, another answer
    trees = share_prefixes(samples, [s.images for s in samples], 1000)
    assert [tree.members for tree in trees] == [(0, 1, 5), (2,), (3,), (4,)]
    assert trees[0].prefix == 4 + NUM_PATCHES
    (pair,) = share_prefixes([samples[0], samples[5]], [("a",), ("a",)], 1000)
    assert pair.prefix == len(samples[0]) - 2
    assert pair.num_tokens == pair.prefix + 4
    two = [record(n, header=2, image="a", text=4, tail_image=name) for n, name in ((0, "x"), (0, "y"))]
    (tree,) = share_prefixes(two, [s.images for s in two], 1000)
    assert tree.prefix == 2 + NUM_PATCHES + 4, "ends where the second image begins"
    assert (tree.images, tree.prefix_images, tree.own_images) == (3, 1, (1, 1))


def test_a_group_too_long_for_a_row_becomes_several_trees() -> None:
    samples = family(6)
    prefix = 4 + NUM_PATCHES
    trees = share_prefixes(samples, [s.images for s in samples], prefix + 30)
    assert len(trees) > 1
    assert [n for tree in trees for n in tree.members] == list(range(6))
    assert all(tree.num_tokens <= prefix + 30 for tree in trees)


@dataclass
class Source:
    """A source whose record n shows image ``n % images`` (none for every seventh)."""

    name: str
    size: int
    images: int
    weight: float = 1.0
    share: float | None = None

    def __len__(self) -> int:
        return self.size

    def image_groups(self) -> np.ndarray:
        groups = np.arange(self.size) % self.images
        groups[::7] = -1
        return groups


def test_an_epoch_brings_records_of_an_image_together_and_loses_none() -> None:
    sources = [Source("few", 300, 60), Source("many", 200, 2, weight=1.5)]
    mixture = Mixture(sources, seed=1, share_at_most=4)
    for epoch in range(2):
        entries = [mixture.record(epoch * 600 + place) for place in range(600)]
        counts = Counter(entries)
        assert set(counts) == {(0, n) for n in range(300)} | {(1, n) for n in range(200)}
        assert sum(counts.values()) == 600
        runs: list[list[tuple[int, int]]] = []
        keys = [(s, int(sources[s].image_groups()[r])) for s, r in entries]
        for entry, key, before in zip(entries, keys, [(-1, -1), *keys], strict=False):
            if key == before and key[1] >= 0:
                runs[-1].append(entry)
            else:
                runs.append([entry])
        few = [run for run in runs if run[0][0] == 0 and run[0][1] % 7]
        assert sum(len(run) for run in few) / len(few) > 3, "five records an image in runs of at most four"
        assert all(len(set(run)) == len(run) for run in runs if len(run) <= 4), "copies of a record do not meet"
        places = [place for place, (s, _) in enumerate(entries) if s == 1]
        assert 240 < np.mean(places) < 360, "long and short runs are spread alike"
    other = Mixture(sources, seed=1, share_at_most=4)
    assert [other.record(p) for p in (7, 650)] == [mixture.record(p) for p in (7, 650)]
