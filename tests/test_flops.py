"""Useful FLOPs against what PyTorch's own counter sees in the matrix products of a real forward and backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.batches import packed
from tests.test_models_assembly import assemble, examples
from vlit.config.schema import TuningConfig
from vlit.models.flops import UsefulFlops
from vlit.models.tuning import apply_tuning

TUNINGS = {
    "align": {},
    "instruct": {"llm": "full"},
    "lora": {"llm": {"mode": "lora", "rank": 4, "alpha": 8}},
}


@pytest.mark.parametrize("name", TUNINGS)
def test_linear_flops_are_those_of_the_products_that_run(name: str, tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig.model_validate(TUNINGS[name]))
    row = packed(examples(model)[:1])
    useful = UsefulFlops(model)
    embeds = torch.randn(1, row.num_tokens, model.llm.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = model.llm.hidden_states(embeds, position_ids=row.position_ids[None], attention_mask=None)
        out.sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counted.items() if op in ("aten.mm", "aten.addmm"))
    assert products == pytest.approx(useful.per_token * row.num_tokens, rel=1e-6)
    assert useful.of(row) > useful.per_token * row.num_tokens
