"""Checkpoints and model folders are there as a whole or not at all, wherever a save is killed and whatever is damaged later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.kill_points import dies_at, points_of
from tests.stage_fixture import ReadyStage, flip, ready_stage, same, usable_state
from vlit.durable import file_sha256, read_sealed, sealed
from vlit.errors import CheckpointError
from vlit.models.artifact import load_model, read_manifest
from vlit.train.checkpoint import Position
from vlit.train.run import _finish


@pytest.fixture(scope="module")
def ready(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ReadyStage:
    threads = torch.get_num_threads()
    found = ready_stage(tiny_dir, tmp_path_factory.mktemp("ready"))
    torch.set_num_threads(1)  # what forks after a parallel region may not compute in parallel
    yield found
    torch.set_num_threads(threads)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("situation", ["the first", "rotates", "replaces a damaged one"])
def test_a_save_killed_at_any_point_leaves_the_old_checkpoint_or_the_new_one(
    situation: str, power_cut: bool, ready: ReadyStage, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    (before / "state").mkdir(parents=True)
    old: dict[str, torch.Tensor] = {}
    if situation != "the first":
        ready.save(before / "state", 1)
        ready.update()
        old = ready.values()
        ready.save(before / "state", 2)
        ready.update()
    if situation == "replaces a damaged one":
        ready.save(before / "state", 3)
        flip(next((before / "state" / "step-3").glob("rank-*")))
        ready.update()
    new, place = ready.values(), tmp_path / "place"

    def save() -> None:
        ready.save(place / "state", 3)

    def afresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place)

    afresh()
    total = points_of(save, place)
    assert total >= 28
    outcomes = []
    for point in range(1, total + 1):
        afresh()
        dies_at(point, save, place, power_cut=power_cut)
        found = usable_state(place / "state", ready.ranks)
        if found is None:
            assert situation == "the first", point
            outcomes.append(0)
        else:
            step, values = found
            outcomes.append(step)
            assert same(values, {2: old, 3: new}[step]), point
        ready.save(place / "state", 3)  # the run that goes on: it saves again and nothing is left over
        assert usable_state(place / "state", ready.ranks)[0] == 3
        assert names_in(place / "state") == ({"step-3"} if situation == "the first" else {"step-2", "step-3"}), point
    assert set(outcomes) == ({0, 3} if situation == "the first" else {2, 3})
    assert outcomes == sorted(outcomes)


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("older", [False, True], ids=["no model yet", "a model of an earlier try"])
def test_writing_the_model_killed_at_any_point_never_leaves_a_mark_without_a_whole_model(
    older: bool, power_cut: bool, ready: ReadyStage, tmp_path: Path
) -> None:
    before, place = tmp_path / "before", tmp_path / "place"
    ready.stage.folder = before / "align"
    ready.stage.folder.mkdir(parents=True)

    def write() -> None:
        weights = ready.engine.whole_weights()
        _finish(
            ready.tuned,
            ready.engine,
            weights,
            ready.stage,
            {"what": "a test"},
            Position(step=6),
            ready.run,
            ready.ranks,
        )

    if older:
        write()
        (before / "align" / "done.json").unlink()
        ready.update()
    ready.stage.folder = place / "align"

    def afresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place)

    afresh()
    total = points_of(write, place)
    assert total >= 20
    done = []
    for point in range(1, total + 1):
        afresh()
        dies_at(point, write, place, power_cut=power_cut)
        done.append((place / "align" / "done.json").is_file())
        if done[-1]:
            assert read_sealed(place / "align" / "done.json")["steps"] == 6
            model = place / "align" / "model"
            files = read_manifest(model)["files"]
            assert files == {name: file_sha256(model / name) for name in files}, point
    assert set(done) == {False, True}
    write()
    model = place / "align" / "model"
    assert names_in(place / "align") == {"model", "done.json"}
    loaded = dict(load_model(model, dtype=torch.float32)[0].connector.named_parameters())
    held = dict(ready.tuned.model.connector.named_parameters())
    assert same(loaded, held)
    assert len(held) == 4


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def older_format(path: Path) -> None:
    state = read_sealed(path)
    path.write_text(sealed(state | {"format": 1}), encoding="utf-8")


DAMAGE: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("a flipped bit of the weights", "rank-*", flip, "rank-00000-of-00001.safetensors does not match its checksum"),
    ("half of the weights", "rank-*", truncate, "rank-00000-of-00001.safetensors does not match its checksum"),
    ("no byte of the weights", "rank-*", lambda p: p.write_bytes(b""), "does not match its checksum"),
    ("no weights", "rank-*", Path.unlink, "rank-00000-of-00001.safetensors is missing"),
    ("a flipped bit of state.json", "state.json", lambda p: flip(p, 40), "state.json does not match its checksum"),
    ("half of state.json", "state.json", truncate, "state.json does not match its checksum"),
    ("no byte of state.json", "state.json", lambda p: p.write_bytes(b""), "state.json does not match its checksum"),
    ("no state.json", "state.json", Path.unlink, "state.json is missing"),
    ("an older format", "state.json", older_format, "it has format 1, this vlit reads format 2"),
]


@pytest.mark.parametrize(("files", "damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_and_when_all_are_damaged_the_run_ends(
    files: str,
    damage: Callable[[Path], object],
    message: str,
    ready: ReadyStage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready.save(tmp_path, 1)
    first = ready.values()
    ready.update()
    ready.save(tmp_path, 2)
    damage(next((tmp_path / "step-2").glob(files)))
    step, values = usable_state(tmp_path, ready.ranks)
    assert step == 1
    assert same(values, first)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert str(tmp_path / "step-2") in warning
    assert message in warning
    damage(next((tmp_path / "step-1").glob(files)))
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is usable: step-2 \(.*, step-1 \(") as caught:
        usable_state(tmp_path, ready.ranks)
    assert message in str(caught.value)
    assert "delete it" in str(caught.value)
    assert names_in(tmp_path) == {"step-1", "step-2"}


def test_a_flip_of_any_byte_of_state_json_is_noticed(ready: ReadyStage, tmp_path: Path) -> None:
    ready.save(tmp_path, 1)
    path = tmp_path / "step-1" / "state.json"
    intact = path.read_bytes()
    assert len(intact) > 300
    for place in range(len(intact)):
        content = bytearray(intact)
        content[place] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match="none of its checkpoints is usable"):
            usable_state(tmp_path, ready.ranks)
    path.write_bytes(intact)
    assert usable_state(tmp_path, ready.ranks)[0] == 1


def test_a_damaged_newer_checkpoint_does_not_displace_the_ones_that_follow(ready: ReadyStage, tmp_path: Path) -> None:
    """Step 6 is damaged, so the run went on from step 3; what it saves now is kept, although 6 is more than 4."""
    for step in (3, 6):
        ready.save(tmp_path, step, keep=2)
    flip(next((tmp_path / "step-6").glob("rank-*")))
    ready.save(tmp_path, 4, keep=1)
    assert usable_state(tmp_path, ready.ranks)[0] == 4
    assert names_in(tmp_path) == {"step-4", "step-6"}
    ready.save(tmp_path, 6, keep=1)
    assert names_in(tmp_path) == {"step-6"}
    assert usable_state(tmp_path, ready.ranks)[0] == 6


def test_a_done_mark_that_is_damaged_is_an_error_with_the_way_out(tiny_dir: Path, tmp_path: Path) -> None:
    from tests.tiny_run import tiny_run
    from vlit.train.run import run_training

    run = tiny_run(tiny_dir, tmp_path / "out", "stages.instruct=null", "stages.align.max_steps=3")
    run_training(run)
    mark = tmp_path / "out" / "align" / "done.json"
    model = (tmp_path / "out" / "align" / "model" / "connector.safetensors").read_bytes()
    for content in (b"", mark.read_bytes()[:40], mark.read_bytes().replace(b'"steps": 3', b'"steps": 7')):
        mark.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"done\.json: damaged .*Delete it"):
            run_training(run)
    mark.unlink()
    run_training(run)
    assert json.loads(mark.read_text())["steps"] == 3
    assert (tmp_path / "out" / "align" / "model" / "connector.safetensors").read_bytes() == model
