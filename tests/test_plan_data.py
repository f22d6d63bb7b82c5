"""`vlit plan` on data that is on this machine: whatever its kind and however its path is written."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run, write_dataset
from vlit.config.schema import RunConfig
from vlit.errors import ConfigError, DataError
from vlit.models.assemble import model_spec
from vlit.plan.workload import Assumed, Workload, workload


def load_of(run: RunConfig, assumed: Assumed | None = None) -> Workload:
    return workload(run, "instruct", model_spec(run.model), assumed or Assumed())


def test_a_folder_and_a_path_in_the_home_folder_are_data_that_is_here(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_dataset(tmp_path / "home" / "set").parent
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        for number in (0, 1, 4):
            shard.add(pictures / f"{number:03d}_0.png", f"{number}.png")
            caption = tarfile.TarInfo(f"{number}.txt")
            caption.size = 9
            shard.addfile(caption, io.BytesIO(b"a caption"))
    folder = f"stages.instruct.data=[{{path: {tmp_path / 'shards'}, format: webdataset}}]"
    found = load_of(tiny_run(tiny_dir, tmp_path / "out", folder))
    assert (found.source, found.records, found.mean("images")) == ("the first 3 records of the data", 3, 1.0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_of(tiny_run(tiny_dir, tmp_path / "out", "stages.instruct.data=[{path: ~/set/data.json}]")).records == 24


def test_given_numbers_replace_those_of_the_data_one_by_one(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out", "stages.instruct.max_steps=null")
    data = load_of(run)
    more = load_of(run, Assumed(records=1000))
    assert (more.records, more.steps) == (1000, 250)
    assert more.sampled == data.sampled
    assert more.source == f"{data.source}, and the command line"
    longer = load_of(run, Assumed(tokens_per_record=200))
    assert longer.records == data.records
    assert longer.mean("tokens") == pytest.approx(200, abs=3)  # whole pictures over a step of four records
    assert longer.mean("images") == pytest.approx(data.mean("images"), abs=0.3)
    plain = load_of(run, Assumed(images_per_record=0))
    text = data.mean("tokens") - data.mean("images") * model_spec(run.model).tokens_per_view
    assert plain.mean("images") == 0
    assert plain.mean("tokens") == pytest.approx(text, abs=1)


def test_what_is_wrong_with_data_that_is_here_is_said(tiny_dir: Path, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set")
    rows = json.loads(path.read_text())
    rows[3]["conversations"] = []
    path.write_text(json.dumps(rows))
    run = tiny_run(tiny_dir, tmp_path / "out", f"stages.instruct.data=[{{path: {path}}}]")
    with pytest.raises(DataError, match=r'stage instruct: data\.json#3 \(id "r3"\): .*on_bad_sample: quarantine'):
        load_of(run)
    assert load_of(run, Assumed(10, 60, 1)).source == "the command line"
    two = f"stages.instruct.data=[{{path: {path}, name: a}}, {{path: gone.json}}]"
    with pytest.raises(ConfigError, match=r'"gone.json" is not here'):
        load_of(tiny_run(tiny_dir, tmp_path / "out", two))
