"""The held-out records are as many as the configuration says, from the sources in turn, on any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run, write_dataset
from vlit.config.schema import DataSource, ValidationConfig
from vlit.data.mixture import Mixture
from vlit.data.source import open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.models.assemble import model_spec
from vlit.train.distributed import start_ranks
from vlit.train.validate import Validator


@pytest.mark.parametrize(("most", "used"), [(256, 26), (20, 20), (3, 3)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_small_sources_do_not_take_the_place_of_others(
    most: int, used: int, world_size: int, tiny_dir: Path, tmp_path: Path
) -> None:
    run = tiny_run(tiny_dir, tmp_path / "unused")
    whole = write_dataset(tiny_dir / "dataset")
    few = tiny_dir / "dataset" / "few.json"
    few.write_text(json.dumps(json.loads(whole.read_text(encoding="utf-8"))[:2]), encoding="utf-8")
    config = ValidationConfig(data=[DataSource(path=str(few)), DataSource(path=str(whole))], max_records=most)
    sources = [
        open_source(source, data=run.data, seed=0, progress=False, manifest=None, stage="x") for source in config.data
    ]
    assert [len(source) for source in sources] == [2, 24]
    ranks = start_ranks(run.runtime)
    validators = [
        Validator(
            Mixture(sources, seed=0), SampleTokenizer(model_spec(run.model), run.data), run.data, config,
            micro_batch_tokens=512, ranks=replace(ranks, rank=rank, world_size=world_size),
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert sum(batch.num_samples for validator in validators for batch in validator.batches) == used
    assert len({tuple(sample.id for sample, _ in validator.shown) for validator in validators}) == 1
