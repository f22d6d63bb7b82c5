"""Steps of one modality (`data.group_by_modality`): what the order promises, and a run on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_run import metrics_of, tiny_run
from vlit.data.mixture import Mixture
from vlit.train.run import run_training


@dataclass
class Source:
    """``pictured`` records with an image, two of them on each, then ``size - pictured`` without."""

    name: str
    size: int
    pictured: int
    weight: float = 1.0
    share: float | None = None

    def __len__(self) -> int:
        return self.size

    def image_groups(self) -> np.ndarray:
        numbers = np.arange(self.size)
        return np.where(numbers < self.pictured, numbers // 2, -1)


def kinds_of(sources: list[Source], records: list[tuple[int, int]]) -> set[bool]:
    return {record < sources[source].pictured for source, record in records}


sizes = st.integers(1, 60).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size)))


@settings(max_examples=300, deadline=None)
@given(
    first=sizes, second=sizes, step=st.integers(1, 70), weight=st.sampled_from([0.5, 1.0, 1.7]), shared=st.sampled_from([1, 4])
)  # fmt: skip
def test_an_epoch_keeps_its_records_and_mixes_them_in_one_step_at_most_but_for_its_ends(
    first: tuple[int, int], second: tuple[int, int], step: int, weight: float, shared: int
) -> None:
    """Also of one modality alone, of a single record, and of fewer records than a step (pains A-56)."""
    sources = [Source("a", *first, weight=weight), Source("b", *second)]
    plain = Mixture(sources, seed=5, share_at_most=shared)
    grouped = Mixture(sources, seed=5, share_at_most=shared, modality_step=step)
    length = grouped.records_per_epoch
    stream = [grouped.record(place) for place in range(3 * length)]
    for epoch in range(3):
        own = stream[epoch * length : (epoch + 1) * length]
        assert Counter(own) == Counter(plain.record(epoch * length + place) for place in range(length))
    steps = [range(begin, begin + step) for begin in range(0, 3 * length - step + 1, step)]
    inside = [s for s in steps if s[0] // length == s[-1] // length]
    mixed = Counter(s[0] // length for s in inside if len(kinds_of(sources, [stream[place] for place in s])) == 2)
    assert all(number <= 1 for number in mixed.values())


def test_the_two_kinds_of_steps_take_turns_and_no_two_epochs_are_alike() -> None:
    source = Source("a", 4000, 3000)
    mixture = Mixture([source], seed=0, modality_step=10)
    orders = []
    for epoch in range(2):
        steps = [mixture.step_records(epoch * 400 + number, 10) for number in range(400)]
        kinds = [kinds_of([source], records) for records in steps]
        assert Counter(map(frozenset, kinds)) == {frozenset({True}): 300, frozenset({False}): 100}
        text = [number for number, kind in enumerate(kinds) if kind == {False}]
        assert 170 < np.mean(text) < 230, "text is spread over the epoch"
        orders.append([record for records in steps for _, record in records])
        positions = {record: place for place, record in enumerate(orders[-1])}
        assert 1700 < np.mean([positions[record] for record in range(1000)]) < 2300, (
            "and so is every stretch of records"
        )
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_has_steps_with_pictures_and_steps_without(tiny_dir: Path, tmp_path: Path, workers: int) -> None:
    """24 records, 6 of them text: four steps of six records an epoch, in which only the connector learns."""
    words = (
        "data.group_by_modality=true",
        f"data.num_workers={workers}",
        "stages.align.max_steps=8",
        "stages.instruct=null",
    )
    run = tiny_run(tiny_dir, tmp_path / "out", *words)
    run_training(run)
    rows = metrics_of(run)
    images = [row["images"] for row in rows]
    for epoch in (images[:4], images[4:]):
        assert [count > 0 for count in sorted(epoch)] == [False, True, True, True]
    assert all(np.isfinite(row["loss"]) for row in rows)
