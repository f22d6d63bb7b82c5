"""Any decoder under packed attention: the model's own logits, no leak, gradients of separate samples, parts and LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from tests.batches import Example, packed, random_example
from tests.tiny import IMAGE_SIZE, LLM_KINDS, NUM_PATCHES, build_encoder, build_llm
from vlit.config.schema import ModelConfig, TuningConfig
from vlit.errors import ModelError
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.generate import Prompt, generate_ids
from vlit.models.tuning import apply_tuning, merge_lora, part_of_parameters, table_of_parts


def assemble(
    tiny_dir: Path, llm: str = "llama_gqa", connector: str = "mlp", encoder: str = "clip"
) -> VisionLanguageModel:
    config = ModelConfig.model_validate(
        {
            "encoder": {"type": "hf", "path": str(build_encoder(encoder, tiny_dir / encoder))},
            "connector": {"type": connector},
            "llm": {"type": "hf", "path": str(build_llm(llm, tiny_dir / llm))},
        }
    )
    return build_model(config, dtype=torch.float32)


def examples(model: VisionLanguageModel) -> list[Example]:
    vocabulary = model.llm.head.weight.shape[0]
    shapes = [(12, 1), (7, 0), (19, 2), (5, 0)]
    return [
        random_example(
            tokens=tokens,
            images=images,
            tokens_per_view=NUM_PATCHES,
            image_size=IMAGE_SIZE,
            vocabulary=vocabulary,
            seed=i,
        )
        for i, (tokens, images) in enumerate(shapes)
    ]


def gradients(model: VisionLanguageModel, batches: list) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    labels = sum(b.num_label_tokens for b in batches)
    for batch in batches:
        (model(batch).total / labels).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_loss_is_that_of_the_models_own_logits(kind: str, tiny_dir: Path) -> None:
    model = assemble(tiny_dir, kind).eval()
    (text_only,) = [e for e in examples(model) if len(e.pixels) == 0][:1]
    batch = packed([text_only])
    with torch.no_grad():
        own = model.llm.hf(input_ids=text_only.ids[None]).logits[0]
        ours = model(batch)
        logits = model.logits(batch)
    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5)
    expected = F.cross_entropy(own[batch.supervised_positions], batch.targets, reduction="none")
    torch.testing.assert_close(ours.per_position, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_packed_equals_separate_in_loss_and_every_gradient(kind: str, tiny_dir: Path) -> None:
    model = assemble(tiny_dir, kind)
    apply_tuning(model, TuningConfig(vision="full", connector="full", llm="full"))
    model.eval()  # dropout off in families that have it
    samples = examples(model)
    together = gradients(model, [packed(samples)])
    apart = gradients(model, [packed([sample]) for sample in samples])
    assert together.keys() == apart.keys()
    assert len(together) == sum(1 for p in model.parameters() if p.requires_grad) > 20
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_perturbing_one_sample_leaves_the_others_logits_alone(kind: str, tiny_dir: Path) -> None:
    model = assemble(tiny_dir, kind).eval()
    samples = examples(model)
    changed = [*samples]
    changed[1] = Example(samples[1].ids.flip(0), samples[1].labels, samples[1].pixels)
    with torch.no_grad():
        before, after = model.logits(packed(samples)), model.logits(packed(changed))
    lengths = [len(s.ids) for s in samples]
    differs = [float((a - b).abs().max()) for a, b in zip(before.split(lengths), after.split(lengths), strict=True)]
    assert differs[1] > 1e-3
    assert [differs[i] for i in (0, 2, 3)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_gradient_checkpointing_changes_no_gradient_with_a_frozen_and_a_trained_llm(
    policy: str, tiny_dir: Path
) -> None:
    for tuning in (TuningConfig(), TuningConfig(vision="full", llm="full")):
        model = assemble(tiny_dir)
        apply_tuning(model, tuning)
        batch = packed(examples(model))
        model.train()
        plain = gradients(model, [batch])
        model.set_gradient_checkpointing(policy)
        model.train()
        recomputed = gradients(model, [batch])
        assert plain.keys() == recomputed.keys()
        assert plain
        for name in plain:
            torch.testing.assert_close(plain[name], recomputed[name], rtol=1e-5, atol=1e-7)


class CountProducts(TorchDispatchMode):
    """Counts matrix products with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(("aten.mm", "aten.addmm"))
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_repeats_no_product_and_full_keeps_least(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(llm="full"))
    batch = packed(examples(model))
    products, held = {}, {}
    for policy in ("none", "selective", "full"):
        model.set_gradient_checkpointing(policy)
        model.train()
        kept: list[int] = []
        with CountProducts() as counted:
            with torch.autograd.graph.saved_tensors_hooks(lambda x, k=kept: (k.append(x.numel()), x)[1], lambda x: x):
                loss = model(batch).total
            loss.backward()
        products[policy], held[policy] = counted.count, sum(kept)
    assert products["selective"] == products["none"] > 0
    assert products["full"] > products["none"]
    assert held["full"] < held["none"]


def test_frozen_parts_cost_no_weight_gradient_and_a_frozen_encoder_no_backward(tiny_dir: Path) -> None:
    counts = {}
    for name, tuning in {
        "align": TuningConfig(),
        "instruct": TuningConfig(llm="full", embeddings="frozen"),
        "all": TuningConfig(vision="full", llm="full", embeddings="frozen"),
    }.items():
        model = assemble(tiny_dir)
        apply_tuning(model, tuning)
        with CountProducts() as counted:
            model(packed(examples(model))).total.backward()
        counts[name] = counted.count
    linears = [m for m in model.llm.trunk.modules() if isinstance(m, torch.nn.Linear)]
    assert counts["instruct"] - counts["align"] == len(linears) > 10
    in_blocks = [m for block in model.encoder.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert counts["all"] - counts["instruct"] >= 2 * len(in_blocks) - 3 > 0


def test_compiled_blocks_give_the_same_gradients_and_one_graph_for_all_lengths(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(llm="full"))
    model.train()
    rows = [packed(examples(model)[:n]) for n in (4, 1, 2, 3)] + [packed(examples(model)[1:])]
    expected = [gradients(model, [row]) for row in rows]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    graphs = []
    for row, wanted in zip(rows, expected, strict=True):
        found = gradients(model, [row])
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=2e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1], f"graphs after each row: {graphs}"


def test_every_parameter_has_one_part_and_the_table_adds_up(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(connector="full", llm="full"))
    rows = table_of_parts(model, TuningConfig(connector="full", llm="full"), lr=1e-3)
    assert [row.part for row in rows] == ["vision", "connector", "llm", "embeddings"]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.trainable for row in rows) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert next(row for row in rows if row.part == "vision").trainable == 0
    assert set(part_of_parameters(model).values()) == {"vision", "connector", "llm", "embeddings"}


def test_lora_trains_adapters_alone_and_merging_keeps_the_logits(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(connector="full", llm={"mode": "lora", "rank": 4, "alpha": 8}))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.startswith("connector.")} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }
    assert not any("lm_head" in n or "embed_tokens" in n for n in trained)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = packed(examples(model))
    model.eval()
    with torch.no_grad():
        before = model.logits(batch)
        merge_lora(model)
        after = model.logits(batch)
        merge_lora(model)  # a second time changes nothing
        again = model.logits(batch)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, again)
    assert not any(".lora_" in n for n, _ in model.named_parameters())


def test_a_stage_that_trains_nothing_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="every part is frozen"):
        apply_tuning(assemble(tiny_dir), TuningConfig(connector="frozen"))


def test_text_only_batch_gives_a_trained_connector_a_zero_gradient_not_none(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig())
    text_only = [e for e in examples(model) if len(e.pixels) == 0]
    found = gradients(model, [packed(text_only)])
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.abs().max() == 0 for g in found.values())


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_batched_generation_equals_single_and_equals_argmax_of_the_packed_forward(kind: str, tiny_dir: Path) -> None:
    model = assemble(tiny_dir, kind).eval()
    prompts = [Prompt(e.ids.clamp(min=0), e.ids < 0, e.pixels) for e in examples(model)]
    together = generate_ids(model, prompts, max_new_tokens=6, stop=[])
    alone = [generate_ids(model, [p], max_new_tokens=6, stop=[])[0] for p in prompts]
    assert together == alone
    for prompt, generated in zip(prompts, alone, strict=True):
        ids = torch.where(prompt.is_image, -1, prompt.input_ids)
        for length in range(len(generated)):
            row = torch.cat([ids, torch.tensor(generated[:length], dtype=torch.int64)])
            example = Example(row, torch.full_like(row, -100), prompt.pixels)
            with torch.no_grad():
                assert int(model.logits(packed([example]))[-1].argmax()) == generated[length]


def test_answers_do_not_depend_on_the_generation_config_of_the_base_model(tiny_dir: Path) -> None:
    model = assemble(tiny_dir).eval()
    prompts = [Prompt(e.ids.clamp(min=0), e.ids < 0, e.pixels) for e in examples(model)]
    plain = generate_ids(model, prompts, max_new_tokens=12, stop=[])
    held = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=3, repetition_penalty=5.0, no_repeat_ngram_size=2, num_beams=2,
        forced_eos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model.llm.hf.generation_config = held
    assert generate_ids(model, prompts, max_new_tokens=12, stop=[]) == plain
    assert model.llm.hf.generation_config is held  # what an export writes


def test_generation_stops_before_a_sequence_of_several_tokens(tiny_dir: Path) -> None:
    model = assemble(tiny_dir).eval()
    prompt = Prompt(
        torch.tensor([5, 6, 7]), torch.zeros(3, dtype=torch.bool), torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)
    )
    free = generate_ids(model, [prompt], max_new_tokens=8, stop=[])[0]
    stopped = generate_ids(model, [prompt], max_new_tokens=8, stop=[free[3:5]])[0]
    first = next(i for i in range(7) if free[i : i + 2] == free[3:5])
    assert stopped == free[:first]
