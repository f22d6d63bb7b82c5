"""Training honours the manifest of ``vlit doctor``: what it leaves out, within which budget, and when it is out of date."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.test_doctor import examined, run_over, small
from vlit.config.schema import RunConfig
from vlit.data.doctor.manifest import manifest_of
from vlit.data.source import open_source
from vlit.errors import DataError
from vlit.train.identity import open_mixture, stage_identity

__all__ = ["small"]


def test_training_leaves_out_what_the_manifest_lists(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small, "data.quarantine_budget=0.5")
    before = open_mixture(run, "instruct", progress=False)
    examined(run)
    assert manifest_of(run) == tmp_path / "out" / "doctor" / "manifest.jsonl"
    after = open_mixture(run, "instruct", progress=False)
    source = after.sources[0]
    assert [source.place(n).split(" ")[0] for n in range(len(source))] == [
        f"data.json#{n}" for n in (0, 2, 3, 5, 7, 8, 9)
    ]
    assert source.num_quarantined == 3
    listed = [json.loads(line) for line in (tmp_path / "out/instruct/quarantine.jsonl").read_text().splitlines()]
    assert [(line["record"], line["found"]) for line in listed] == [(1, "doctor"), (4, "doctor"), (6, "doctor")]
    identities = [stage_identity(run, "instruct", mixture, "", None, None) for mixture in (before, after)]
    assert identities[0]["sources"] != identities[1]["sources"]
    again = open_mixture(run, "instruct", progress=False)
    assert again.sources[0].content_hash == source.content_hash
    assert len((tmp_path / "out/instruct/quarantine.jsonl").read_text().splitlines()) == 3
    (tmp_path / "out/doctor/manifest.jsonl").unlink()
    without = open_mixture(run, "instruct", progress=False)
    assert without.sources[0].content_hash == before.sources[0].content_hash
    assert (tmp_path / "out/instruct/quarantine.jsonl").read_text() == ""


def opened(
    run: RunConfig, manifest: Path | None, stage: str = "instruct", *, most: int | None = None, **data: Any
) -> Any:
    """The run's dataset, opened under other data rules."""
    source = run.stages["instruct"].data[0].model_copy(update={"max_records": most})
    rules = run.data_for("instruct").model_copy(update=data)
    return open_source(source, data=rules, seed=0, progress=False, manifest=manifest, stage=stage)


def test_the_manifest_is_a_policy_with_a_budget(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small)
    examined(run)
    manifest = manifest_of(run)
    with pytest.raises(DataError, match=r"mine: 3 of 10 records are quarantined \(30.00%\), more than .* 1.00%"):
        opened(run, manifest)
    assert len(opened(run, manifest, stage="align")) == 10  # another stage's data, other rules
    source = opened(run, manifest, quarantine_budget=0.3)
    assert len(source) == 7
    drawn = opened(run, manifest, most=6, quarantine_budget=0.3)
    assert len(drawn) == 6  # drawn from the good ones
    assert {drawn.place(n) for n in range(6)} < {source.place(n) for n in range(7)}
    with pytest.raises(DataError, match=r'data.json: 3 records are bad.*vlit doctor.*\n  data.json#1 \(id "r1"\)'):
        opened(run, manifest, on_bad_sample="error")


def test_a_manifest_of_another_content_is_refused(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small, "data.quarantine_budget=0.5")
    examined(run)
    rows = json.loads(small.read_text())
    small.write_text(json.dumps(rows[::-1]))
    with pytest.raises(DataError, match=r"lists bad records of mine .* Run vlit doctor again, or delete the manifest"):
        opened(run, manifest_of(run))
    examined(run)
    assert len(opened(run, manifest_of(run))) == 7
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"record": 1}\n')
    with pytest.raises(DataError, match=r"broken.jsonl:1: not a line of a manifest"):
        opened(run, broken)


def test_a_manifest_of_other_rules_is_refused_and_a_new_name_loses_none_of_it(
    tiny_dir: Path, tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_over(tiny_dir, tmp_path / "out", small, "data.quarantine_budget=0.5")
    examined(run)
    manifest = manifest_of(run)
    with pytest.raises(DataError, match=r"other rules \(max_tokens 1024, now 2000\)\. Run vlit doctor again"):
        opened(run, manifest, max_tokens=2000)
    source = run.stages["instruct"].data[0]
    how: dict[str, Any] = {"data": run.data_for("instruct"), "seed": 0, "progress": False, "stage": "instruct"}
    renamed = open_source(source.model_copy(update={"name": "yours"}), manifest=manifest, **how)
    assert (len(renamed), renamed.num_quarantined) == (7, 3)
    elsewhere = shutil.copytree(small.parent, tmp_path / "elsewhere")
    capsys.readouterr()
    assert len(open_source(source.model_copy(update={"images": str(elsewhere)}), manifest=manifest, **how)) == 7
    assert capsys.readouterr().err.count("with other images") == 1


def test_a_manifest_can_be_named_and_must_then_exist(tiny_dir: Path, tmp_path: Path, small: Path) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    run = run_over(tiny_dir, tmp_path / "out", small, f"data.manifest={elsewhere}")
    with pytest.raises(DataError, match=r"elsewhere.jsonl does not exist. Run vlit doctor"):
        manifest_of(run)
    elsewhere.touch()
    assert manifest_of(run) == elsewhere
