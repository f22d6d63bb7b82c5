"""On a GPU: a step gives the CPU's gradients and never makes the host wait between its first kernel and its last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.batches import packed
from tests.test_models_assembly import assemble, examples, gradients
from vlit.config.schema import TuningConfig
from vlit.models.tuning import apply_tuning
from vlit.train.step import on_device

pytestmark = pytest.mark.gpu


def test_gradients_on_the_gpu_are_those_on_the_cpu(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    apply_tuning(model, TuningConfig(vision="full", llm="full"))
    row = packed(examples(model))
    expected = gradients(model, [row])
    found = gradients(model.cuda(), [row.to("cuda")])
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name].cpu(), wanted, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_host_never_waits_inside_a_step(tiny_dir: Path) -> None:
    model = assemble(tiny_dir).cuda()
    apply_tuning(model, TuningConfig(llm="full"))
    model.train()
    gradients(model, [packed(examples(model)).to("cuda")])  # kernels compile and prove themselves
    rows = [packed(examples(model)[n:]).map(torch.Tensor.pin_memory) for n in (1, 2, 3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row, source_of_target in on_device(rows, torch.device("cuda"), ["test"]):
            loss = model(row)
            (loss.total / 100).backward()
            torch.zeros(1, device="cuda").index_add_(0, source_of_target, loss.per_position.float())
    finally:
        torch.cuda.set_sync_debug_mode("default")
