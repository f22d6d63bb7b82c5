"""Two ranks, interrupted and resumed: under every strategy, on other ranks, under another strategy, after faults."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rank_cases import Case, run_cases
from tests.rank_hooks import Hook, Stopped, installed
from tests.test_strategies import load_model_files
from tests.tiny_run import tiny_run
from vlit.train.run import run_training

pytestmark = pytest.mark.slow  # two minutes, nearly all of it in the two starts

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
TUNINGS = {
    "full": "{connector: full, llm: full}",
    "lora": "{connector: full, llm: {mode: lora, rank: 4, alpha: 8, dropout: 0.1}}",
}
STEPS, RECORDS = 6, 24
BASE = (
    "stages.align=null",
    f"stages.instruct.max_steps={STEPS}",
    "stages.instruct.global_batch=8",  # an epoch is three steps
    "stages.instruct.micro_batch_tokens=300",
    "stages.instruct.checkpoint.every_steps=2",
    "runtime.hang_timeout_s=60",
)
EVERY = "stages.instruct.checkpoint.every_steps=1"
FAULTS = ("gradient", "projector", "pixels")
CHAINS = {"ranks 2, 1, 2": ("ddp", "none", "ddp"), "zero3, ddp, zero2": ("zero3", "ddp", "zero2")}


class Runs:
    """All runs of this file. Two starts of two ranks, and in between what one rank does."""

    def __init__(self, tiny_dir: Path, out: Path) -> None:
        self.tiny_dir, self.out = tiny_dir, out
        first: list[Case] = []
        for strategy in STRATEGIES:
            for tuning in TUNINGS:
                name = f"{strategy}-{tuning}"
                first.append(
                    self.case(f"straight-{name}", strategy, tuning, hook=Hook(ids=self.ids(f"straight-{name}")))
                )
                first.append(self.case(f"resumed-{name}", strategy, tuning, hook=Hook(stop_after=3)))
                first.append(replace(first[-1], hook=Hook()))
        for strategy in ("ddp", "zero2"):
            for fault in (*FAULTS, "skip"):
                first.append(self.case(f"{fault}-{strategy}", strategy, hook=Hook(spoil=fault, steps=(2,))))
            words = ("stages.instruct.max_non_finite_steps=1",)
            first.append(
                self.case(
                    f"for good-{strategy}",
                    strategy,
                    words=words,
                    hook=Hook(spoil="projector for good", steps=(2,)),
                    may_fail=True,
                )
            )
        words = (EVERY, "stages.instruct.checkpoint.max_failures=2")
        first.append(self.case("no disk", "ddp", words=words, hook=Hook(no_disk_after=3), may_fail=True))
        first.append(replace(first[-1], hook=Hook(), may_fail=False))
        across = [self.leg(name, number) for name in CHAINS for number in (1, 2, 3)]
        first += [across[0], *across[3:]]
        done = run_cases(2, first, tiny_dir, out / "first", timeout_s=540)
        assert done.returncode == 0, done.stdout[-6000:]
        self.output = done.stdout
        with installed(across[1].hook), pytest.raises(Stopped):
            run_training(tiny_run(tiny_dir, across[1].output, *across[1].overrides))
        done = run_cases(2, [across[2]], tiny_dir, out / "second", timeout_s=180)
        assert done.returncode == 0, done.stdout[-6000:]
        self.output += done.stdout

    def case(
        self,
        name: str,
        strategy: str,
        tuning: str = "full",
        words: tuple[str, ...] = (),
        hook: Hook = Hook(),  # noqa: B008
        may_fail: bool = False,
    ) -> Case:
        overrides = (*BASE, f"stages.instruct.tuning={TUNINGS[tuning]}", f"runtime.strategy={strategy}", *words)
        return Case(self.out / name, overrides, may_fail=may_fail, hook=hook)

    def leg(self, chain: str, number: int) -> Case:
        """One of three parts of a run; a part that is stopped after step k leaves the checkpoint of step k - 1."""
        hook = Hook(stop_after={1: 2, 2: 4, 3: 0}[number], ids=self.ids(f"{chain}-{number}"))
        return self.case(chain, CHAINS[chain][number - 1], words=(EVERY,), hook=hook)

    def ids(self, name: str) -> str:
        folder = self.out / "ids" / name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def records(self, name: str) -> dict[int, list[str]]:
        """Step -> the records that all ranks had in it, sorted."""
        found: dict[int, list[str]] = {}
        for path in (self.out / "ids" / name).iterdir():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                found.setdefault(row["step"], []).extend(row["ids"])
        return {step: sorted(ids) for step, ids in found.items()}

    def rows(self, name: str) -> list[dict]:
        rows = Case(self.out / name, ()).rows()
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return rows

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name)]

    def model_differs(self, left: str, right: str) -> list[str]:
        """Names of weights that are not equal bit for bit."""
        a, b = (load_model_files(self.out / name / "instruct" / "model") for name in (left, right))
        assert a.keys() == b.keys()
        assert len(a) >= 10
        return [name for name in a if not a[name].equal(b[name])]


@pytest.fixture(scope="module")
def runs(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_dir, tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stopped_and_resumed_on_two_ranks_equals_straight_bit_for_bit(strategy: str, tuning: str, runs: Runs) -> None:
    name = f"{strategy}-{tuning}"
    assert f"resuming after step 2/{STEPS} from {runs.out / f'resumed-{name}'}" in runs.output
    assert runs.losses(f"resumed-{name}") == runs.losses(f"straight-{name}")
    assert runs.model_differs(f"resumed-{name}", f"straight-{name}") == []


@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_on_other_ranks_and_under_other_strategies_the_losses_are_those_of_one_run(
    chain: str, runs: Runs
) -> None:
    straight, found = runs.losses("straight-ddp-full"), runs.losses(chain)
    assert len(found) == STEPS
    for ours, theirs in zip(found, straight, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert runs.output.count(f"from {runs.out / chain}") >= 1


@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_on_other_ranks_every_epoch_holds_every_record_once(chain: str, runs: Runs) -> None:
    seen: dict[int, list[str]] = {}
    for number in (1, 2, 3):
        for step, ids in runs.records(f"{chain}-{number}").items():
            assert seen.setdefault(step, ids) == ids  # a step that is done again holds the same records
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert seen == runs.records("straight-ddp-full")
    for epoch in (0, 1):
        counted = Counter(i for step in range(3) for i in seen[3 * epoch + step + 1])
        assert counted == Counter(f"r{number}" for number in range(RECORDS))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_nan_on_one_rank_only_discards_the_step_on_all_and_leaves_no_trace(
    fault: str, strategy: str, runs: Runs
) -> None:
    name, reference = f"{fault}-{strategy}", f"skip-{strategy}"
    rows = runs.rows(name)
    norms = rows[1]["grad_norms"]
    assert any(value != value for value in norms.values()), norms  # the log shows NaN, not an average without it
    assert [row["loss"] for row in rows[2:]] == runs.losses(reference)[2:]
    assert runs.losses(reference)[2:] != runs.losses(f"straight-{strategy}-full")[2:]
    assert runs.model_differs(name, reference) == []
    lines = (runs.out / name / "instruct" / "non_finite.jsonl").read_text(encoding="utf-8").splitlines()
    reports = {row["rank"]: row for row in map(json.loads, lines)}
    assert len(lines) == len(reports) == 2
    assert {row["step"] for row in reports.values()} == {2}
    assert reports[1]["grad_norms"]["connector"] == "nan"
    own = runs.out / "ids" / f"straight-{strategy}-full" / "rank-1.jsonl"
    had = {row["step"]: row["ids"] for row in map(json.loads, own.read_text(encoding="utf-8").splitlines())}
    assert reports[1]["sample_ids"] == had[2] != []


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_weights_that_stay_nan_on_one_rank_end_the_run_on_all(strategy: str, runs: Runs) -> None:
    place = runs.out / f"for good-{strategy}"
    error = f"case {place}: TrainingError: stage instruct: 2 steps had a non-finite loss or gradient"
    assert runs.output.count(error) == 2
    assert len(runs.rows(place.name)) == 3
    assert not (place / "instruct" / "model").exists()


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_nobody_waits_for_its_note(runs: Runs) -> None:
    error = f"case {runs.out / 'no disk'}: CheckpointError: 2 checkpoints in a row could not be written"
    assert runs.output.count(error) == 2
    assert "Input/output error" in runs.output
    # the thread that writes step 2 may still meet the fault of step 3
    assert re.search(rf"resuming after step [12]/{STEPS} from {runs.out / 'no disk'}", runs.output)
    assert runs.losses("no disk") == runs.losses("straight-ddp-full")
    assert runs.model_differs("no disk", "straight-ddp-full") == []
