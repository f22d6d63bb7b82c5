"""What `vlit doctor` finds in one record, and what happens when a worker dies of one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.doctor_templates  # noqa: F401  (registers a template)
from tests.tiny_run import tiny_run
from vlit.config.schema import DataConfig
from vlit.data.doctor.checks import Finding
from vlit.data.doctor.pool import run_job
from vlit.data.doctor.records import LengthBound, RecordJob, Rows, read_samples
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.train.identity import open_mixture
from vlit.types import Sample, Turn

ROOT = Path(__file__).resolve().parent.parent
EVIL = '<img src=x onerror="alert(1)">'


def sample(*texts: str, images: tuple[str, ...] = (), id: str = "a") -> Sample:
    roles: Any = ("user", "assistant")
    return Sample(id=id, source="", turns=tuple(Turn(roles[n % 2], t) for n, t in enumerate(texts)), images=images)


def record_job(tiny_spec: Any, **rules: Any) -> RecordJob:
    job = RecordJob([""], [SampleTokenizer(tiny_spec, DataConfig(**rules))])
    job._bounds[0] = LengthBound(job.tokenizers[0])
    return job


def test_records_that_do_not_fit_are_told_apart(tiny_spec: Any) -> None:
    job = record_job(tiny_spec, max_tokens=200)
    long = "what is this " * 200

    def checks(*texts: str) -> list[str]:
        return [finding.check for finding in job.look(sample(*texts))]

    assert checks("What?", "A tile.") == []
    assert checks("Was ist das für ein Bäcker?", "Ein schöner.") == []  # not ASCII: tokenised to know
    assert checks("What?", "A tile.", long, "Yes.") == ["drops_turns"]
    assert checks("What?", long) == ["cuts_answer"]
    assert checks(long, "A tile.") == ["no_supervision"]
    (found,) = job.look(sample("a", "b", "c " * 400, "d"))
    assert found.reason == "2 of 4 turns do not fit into max_tokens 200"


def test_a_template_that_cannot_hold_a_record_is_a_finding_of_it(tiny_spec: Any) -> None:
    job = record_job(tiny_spec, template="plain")
    assert job.look(sample("What?", "A tile.")) == []
    (found,) = job.look(sample("What?", "A tile.", "Sure?", "Yes."))
    assert found.check == "template"
    assert "one question and one answer" in found.reason


@pytest.mark.parametrize("template", ["v1", "plain", "chatml", "llama3"])
def test_the_length_bound_is_never_wrong(tiny_spec: Any, template: str) -> None:
    tokenizer = SampleTokenizer(tiny_spec, DataConfig(template=template, max_tokens=400))
    bound = LengthBound(tokenizer)
    generator = np.random.default_rng(0)
    letters = [*map(chr, range(32, 127)), "\n", "é", "漢", "</s>", "<|im_end|>", "   "]
    sure = 0
    for _ in range(400):
        texts = ["".join(generator.choice(letters, size=generator.integers(1, 60))) or "a" for _ in range(2)]
        texts = [text if text.strip() else "a" for text in texts]
        record = sample(*(["<image>", *texts[1:]] if generator.random() < 0.3 else texts))
        images = sum(turn.text.count("<image>") for turn in record.turns)
        record = sample(*(turn.text for turn in record.turns), images=("a.png",) * images)
        if bound.surely_fits(record):
            tokens = tokenizer.tokenize(record)
            assert tokens.dropped_turns == tokens.cut_tokens == 0
            assert tokens.num_label_tokens > 0
            sure += 1
    assert 40 < sure < 400


def test_bulk_reading_gives_the_records_of_the_index(tiny_dir: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out")
    source = open_mixture(run, "instruct", progress=False).sources[0]
    table = source.rows.table()
    for start, stop in ((0, len(source)), (3, 11), (7, 8), (5, 5)):
        read = list(read_samples(table, start, stop, source.name))
        assert read == [source.sample(row) for row in range(start, stop)]
    rows = Rows(2, 10, 20)
    assert (len(rows), rows[:3], rows[4:], rows[3]) == (10, Rows(2, 10, 13), Rows(2, 14, 20), 13)


# --- workers that die -------------------------------------------------------------------------------------------------


class FragileJob:
    """Items are words: ``kill``, ``segfault``, ``once:<marker file>``, ``sleep``, ``raise``; others give nothing."""

    def start(self) -> None:
        pass

    def begin(self, task: Any) -> Any:
        return task

    def look(self, item: str) -> list[Finding]:
        if item == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == "sleep":
            time.sleep(3600)
        if item == "raise":
            raise RuntimeError("no luck")
        if item.startswith("once:") and not Path(item[5:]).exists():
            Path(item[5:]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [Finding("image_tiny", item)] if item == "odd" else []

    def end(self) -> None:
        return None


class HopelessJob(FragileJob):
    def start(self) -> None:
        raise DataError("the tokenizer is not there")


class DyingJob(FragileJob):
    def start(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_worker_is_the_finding_of_the_item_it_looked_at(tmp_path: Path) -> None:
    once = f"once:{tmp_path / 'marker'}"
    words = ["a", "kill", "odd", "b", "segfault", "c", once, "odd", "sleep", "raise", "d", "odd"]
    tasks = [words[at : at + 5] for at in range(0, len(words), 5)]
    found: dict[str, list[str]] = {}
    looked: list[str] = []
    for done in run_job(FragileJob(), tasks, workers=2, stuck_after_s=2):
        looked += done.task
        for place, findings in done.found:
            found.setdefault(done.task[place], []).extend(f"{f.check}: {f.reason}" for f in findings)
    assert sorted(looked) == sorted(words)  # each is accounted for, none twice
    assert found.pop("odd") == ["image_tiny: odd"] * 3
    assert found.pop("raise") == ["crash: RuntimeError: no luck"]
    assert found.pop("kill")[0].startswith("crash: the process that looked at it died, twice: SIGKILL")
    assert found.pop("segfault") == ["crash: the process that looked at it died, twice: SIGSEGV"]
    assert found.pop("sleep") == ["crash: it took longer than 2 s"]
    assert found.pop(once)[0].startswith("crash_once: a process died while it looked at it: SIGKILL")
    assert found == {}


def test_workers_that_cannot_start_end_the_examination_with_their_error() -> None:
    with pytest.raises(DataError, match="the tokenizer is not there"):
        list(run_job(HopelessJob(), [["a"]], workers=1))
    with pytest.raises(DataError, match=r"die before they look at anything .*SIGKILL"):
        list(run_job(DyingJob(), [["a"]], workers=1))
