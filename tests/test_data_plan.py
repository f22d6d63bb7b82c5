"""Order, mixture and packing: pure functions, tested as such."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlit.data.mixture import Mixture
from vlit.data.pack import pack
from vlit.data.shuffle import permutation, random_uint64, stream_key
from vlit.errors import DataError


@dataclass
class Source:
    name: str
    size: int
    weight: float = 1.0
    share: float | None = None

    def __len__(self) -> int:
        return self.size


def test_random_numbers_are_splitmix64():
    """First outputs for seed 1234567, as published with the reference implementation."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_uint64(5, 1234567).tolist() == expected


def test_permutations_are_permutations_and_differ_by_key():
    orders = [permutation(1000, stream_key(seed, "epoch", epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
    assert len({tuple(order.tolist()) for order in orders}) == 6
    positions = np.mean([order[:10].mean() for order in orders])
    assert 400 < positions < 600, "no drift towards one end"


def test_an_epoch_shows_every_record_once_in_an_order_of_its_own():
    mixture = Mixture([Source("a", 30), Source("b", 12)], seed=3)
    assert mixture.records_per_epoch == 42
    epochs = [[mixture.record(epoch * 42 + place) for place in range(42)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, n) for n in range(30)] + [(1, n) for n in range(12)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert [mixture.record(place) for place in range(42)] == epochs[0], "asking again, out of order"
    other = Mixture([Source("a", 30), Source("b", 12)], seed=4)
    assert [other.record(place) for place in range(42)] != epochs[0]


def test_shares_hold_whatever_the_sizes_and_within_a_source_records_are_seen_equally_often():
    mixture = Mixture(
        [Source("small", 10, share=0.5), Source("large", 90, share=0.3), Source("text", 100, share=0.2)], 0
    )
    assert mixture.records_per_epoch == 200
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(9):
        drawn = [(int(entry) >> 40, int(entry) & ((1 << 40) - 1)) for entry in mixture.epoch(epoch)]
        assert Counter(source for source, _ in drawn) == {0: 100, 1: 60, 2: 40}
        seen.update(drawn)
    for source, size, records in ((0, 10, 900), (1, 90, 540), (2, 100, 360)):
        times = [seen[source, record] for record in range(size)]
        assert sum(times) == records
        assert max(times) - min(times) <= 1
    many = Mixture([Source("small", 1000, share=0.25), Source("large", 9000, share=0.75)], 0)
    first = np.mean([many.record(position)[0] == 0 for position in range(2000)])
    assert abs(first - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5, "shares hold in every stretch of the order"


@pytest.mark.parametrize("weight", [0.25, 0.3, 0.5, 1.5, 2.0, 3.7])
def test_weights_are_exact_per_epoch_and_fair_over_epochs(weight: float):
    source = Source("a", 20, weight)
    mixture = Mixture([source, Source("b", 7)], seed=0)
    per_epoch = round(20 * weight)
    assert mixture.records_per_epoch == per_epoch + 7
    total: Counter[int] = Counter()
    for epoch in range(20):
        entries = [
            mixture.record(epoch * mixture.records_per_epoch + place) for place in range(mixture.records_per_epoch)
        ]
        seen = Counter(record for number, record in entries if number == 0)
        assert seen.total() == per_epoch
        assert set(seen.values()) <= {int(weight), int(weight) + 1}, "never twice more than another within an epoch"
        total += seen
    assert set(total.values()) == {per_epoch}, "20 epochs of 20 records: everyone equally often"


def test_steps_cut_the_endless_stream_and_the_last_of_an_epoch_is_filled_from_the_next():
    mixture = Mixture([Source("a", 10)], seed=0)
    stream = [mixture.record(place) for place in range(30)]
    steps = [mixture.step_records(step, 4) for step in range(7)]
    assert [entry for step in steps for entry in step] == stream[:28]
    assert mixture.total_steps(1, global_batch=4) == 3
    assert mixture.total_steps(2, global_batch=4) == 5
    assert mixture.total_steps(0.5, global_batch=4) == 2
    assert mixture.total_steps(1, global_batch=64) == 1
    assert mixture.total_steps(1, global_batch=4, max_steps=7) == 7
    assert len(mixture.step_records(0, 64)) == 64, "a step may be longer than an epoch"


def test_published_step_counts():
    assert Mixture([Source("mix665k", 665_298)], seed=0).total_steps(1, global_batch=128) == 5198
    assert Mixture([Source("lcs558k", 558_128)], seed=0).total_steps(1, global_batch=256) == 2181


def test_a_mixture_travels_to_workers_without_its_cache():
    mixture = Mixture([Source("a", 100_000)], seed=0)
    expected = [mixture.record(place) for place in range(5)]
    data = pickle.dumps(mixture)
    assert len(data) < 1000
    assert [pickle.loads(data).record(place) for place in range(5)] == expected


def test_bad_mixtures_are_refused():
    with pytest.raises(DataError, match="no source"):
        Mixture([], seed=0)
    with pytest.raises(DataError, match='two data sources are named "a"'):
        Mixture([Source("a", 1), Source("a", 2)], seed=0)


lengths = st.lists(st.integers(1, 60), max_size=60)


@settings(max_examples=300, deadline=None)
@given(lengths=lengths, max_tokens=st.integers(1, 100), world_size=st.integers(1, 5), images=st.integers(0, 4))
def test_packs_hold_every_record_once_within_the_limit_on_ranks_of_equal_count(
    lengths: list[int], max_tokens: int, world_size: int, images: int
):
    image_tokens = [length // 2 if number % (images + 1) else 0 for number, length in enumerate(lengths)]
    plan = pack(lengths, max_tokens, world_size, image_tokens=image_tokens)
    assert plan == pack(lengths, max_tokens, world_size, image_tokens=image_tokens)
    assert len(plan) == world_size
    assert len({len(rows) for rows in plan}) == 1, "the same number of micro-batches on every rank"
    rows = [row for rank in plan for row in rank]
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[number] for number in row) <= max_tokens or len(row) == 1
    if len(lengths) >= len(rows):
        assert all(rows), "no empty row while records could have been spread"


def test_packing_uses_few_rows_and_balances_them():
    rng = np.random.default_rng(0)
    lengths = rng.integers(60, 900, 128).tolist()
    for world_size in (1, 4, 8):
        plan = pack(lengths, 4096, world_size)
        rows = [row for rank in plan for row in rank]
        fewest = -(-sum(lengths) // 4096)
        assert len(rows) <= -(-(fewest + 1) // world_size) * world_size
        totals = [sum(lengths[number] for row in rank for number in row) for rank in plan]
        assert max(totals) <= 1.02 * min(totals)
        for place in range(len(plan[0])):  # ranks compute place by place together
            together = [sum(lengths[number] for number in rank[place]) for rank in plan]
            assert max(together) <= 1.1 * min(together)


def test_images_count_when_ranks_are_balanced():
    plan = pack([100] * 8, 200, 2, image_tokens=[100, 100, 100, 100, 0, 0, 0, 0])
    for rank in plan:
        assert sum(number < 4 for row in rank for number in row) == 2
