"""Rotary embeddings that depend on the longest sample of a row: refused at start-up beyond the length where that begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batches import packed, random_example
from tests.test_interop_parity import assemble
from tests.tiny import build_llm
from tests.tiny_run import tiny_run
from vlit.errors import ConfigError
from vlit.models.rope import check_lengths
from vlit.train.run import run_training

LIMIT = 32
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + number for number in range(8)],
    },
    "original_max_position_embeddings": LIMIT,
    "max_position_embeddings": 512,
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": LIMIT,
}
CASES = [("phi3", LONGROPE), ("llama_gqa", DYNAMIC)]


def _write(kind: str, changes: dict[str, Any], folder: Path) -> Path:
    file = build_llm(kind, folder / kind) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_the_limit_is_where_packed_and_separate_part(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = assemble(_write(kind, changes, tmp_path), llm=kind)

    def difference(longest: int) -> float:
        samples = [
            random_example(tokens=n, images=0, tokens_per_view=4, image_size=32, vocabulary=300, seed=n)
            for n in (20, longest)
        ]
        with torch.no_grad():
            apart = model.logits(packed(samples[:1]))
            return float((model.logits(packed(samples))[:20] - apart).abs().max())

    assert difference(LIMIT) < 1e-5
    assert difference(LIMIT + 1) > 1e-3
    check_lengths(model.config.llm, {"data.max_tokens": LIMIT})
    with pytest.raises(ConfigError, match=rf"data.max_tokens: {LIMIT + 1}, .* more than {LIMIT} tokens"):
        check_lengths(model.config.llm, {"data.max_tokens": LIMIT + 1})


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_run_names_key_and_lengths_before_it_reads_data(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    run = tiny_run(_write(kind, changes, tmp_path), tmp_path / "out", "stages.instruct.max_tokens=30", llm=kind)
    with pytest.raises(ConfigError, match=r"data.max_tokens: 1024, .* change for a whole row .* more than 32 tokens"):
        run_training(run)
    assert not (tmp_path / "cache").exists()
