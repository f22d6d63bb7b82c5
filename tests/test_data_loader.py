"""Tokenized samples on their way into steps: truncation, collate, loader, resume, quarantine, checks."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data_fixtures import conversation, make_spec, write_dataset
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from vlit.config.schema import DataConfig, DataSource
from vlit.data.check import check_supervision
from vlit.data.collate import collate
from vlit.data.images import load_view
from vlit.data.load import StepLoader, resolve_num_workers
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource, open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError, ModelError
from vlit.types import IGNORE_INDEX, PackedBatch, Sample, StepBatch, Turn

GLOBAL_BATCH, MICRO_TOKENS = 12, 300


@pytest.fixture
def spec_path(tokenizer_dir: Callable[[str], str]) -> str:
    return tokenizer_dir("llama3")


def make_loader(folder: Path, spec_path: str, *, path: Path | None = None, **options: Any) -> StepLoader:
    changes = options.pop("data", {})
    data = DataConfig(template="llama3", cache_dir=str(folder / "cache"), max_tokens=200, **changes)
    path = path or folder / "data.json"
    if not path.exists():
        write_dataset(folder, 50)
    source = open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)
    mixture = Mixture([source], seed=0)
    arguments = {"global_batch": GLOBAL_BATCH, "micro_batch_tokens": MICRO_TOKENS, "total_steps": 6, "num_workers": 0}
    return StepLoader(mixture, SampleTokenizer(make_spec(spec_path), data), data, **{**arguments, **options})


def content(step: StepBatch) -> tuple[Any, ...]:
    """Everything in a step, comparable."""
    micro = [
        (m.input_ids.tolist(), m.position_ids.tolist(), m.is_image.tolist(), m.supervised_positions.tolist(),
         m.targets.tolist(), m.segments, m.sample_ids, m.sources, m.pixels.numpy().tobytes())
        for m in step.micro_batches
    ]  # fmt: skip
    return step.step, micro, step.quarantined, step.dropped_turns, step.cut_tokens


def samples_of(steps: list[StepBatch]) -> list[str]:
    return [name for step in steps for micro in step.micro_batches for name in micro.sample_ids]


def test_steps_are_the_same_for_every_number_of_workers(tmp_path: Path, spec_path: str):
    reference = [content(step) for step in make_loader(tmp_path, spec_path)]
    assert len(reference) == 6
    assert len({name for step in reference for micro in step[1] for name in micro[6]}) == 50, "more than an epoch"
    for workers in (1, 2):
        assert [content(step) for step in make_loader(tmp_path, spec_path, num_workers=workers)] == reference


def test_ranks_share_out_the_records_of_one_rank(tmp_path: Path, spec_path: str):
    alone = list(make_loader(tmp_path, spec_path))
    ranks = [list(make_loader(tmp_path, spec_path, rank=rank, world_size=3)) for rank in range(3)]
    for step, expected in enumerate(alone):
        together = [rank[step] for rank in ranks]
        assert sorted(samples_of(together)) == sorted(samples_of([expected]))
        assert len({len(batch.micro_batches) for batch in together}) == 1
        labels = sum(micro.num_label_tokens for batch in together for micro in batch.micro_batches)
        assert labels == sum(micro.num_label_tokens for micro in expected.micro_batches) > 0
        images = sum(micro.num_images for batch in together for micro in batch.micro_batches)
        assert images == sum(micro.num_images for micro in expected.micro_batches)


def test_resuming_at_a_step_continues_as_if_never_stopped(tmp_path: Path, spec_path: str):
    straight = [content(step) for step in make_loader(tmp_path, spec_path)]
    for start in (1, 4, 6):
        resumed = make_loader(tmp_path, spec_path, start_step=start, num_workers=start % 2)
        assert len(resumed) == 6 - start
        assert [content(step) for step in resumed] == straight[start:]
    assert content(make_loader(tmp_path, spec_path).step(3)) == straight[3]


def test_a_loader_can_be_sent_to_a_fresh_process(tmp_path: Path, spec_path: str):
    """Python 3.14 starts workers without forking."""
    loader = make_loader(tmp_path, spec_path)
    sent = pickle.dumps(loader._steps)
    assert len(sent) < 10_000
    assert content(pickle.loads(sent)[2].batch) == content(loader.step(2))


def test_a_packed_row_holds_its_samples_and_pictures_in_order(tmp_path: Path, spec_path: str):
    loader = make_loader(tmp_path, spec_path)
    source = loader._mixture.sources[0]
    tokenizer = loader._steps.tokenizer
    by_id = {source.sample(index).id: source.sample(index) for index in range(len(source))}
    seen_images = 0
    for step in loader:
        for micro in step.micro_batches:
            assert micro.num_tokens == sum(s.length for s in micro.segments) <= MICRO_TOKENS
            begin, views = 0, list(micro.pixels.numpy())
            for name, length in zip(micro.sample_ids, micro.sample_lengths, strict=True):
                alone = tokenizer.tokenize(by_id[name])
                part = slice(begin, begin + length)
                assert micro.input_ids[part].tolist() == alone.input_ids.tolist()
                assert micro.is_image[part].tolist() == alone.is_image.tolist()
                assert micro.position_ids[part].tolist() == list(range(length))
                inside = (micro.supervised_positions >= begin) & (micro.supervised_positions < begin + length)
                where = micro.supervised_positions[inside] - begin
                assert where.tolist() == np.flatnonzero(alone.labels != IGNORE_INDEX).tolist()
                assert micro.targets[inside].tolist() == alone.labels[where.numpy()].tolist()
                for image in alone.images:
                    expected = load_view(source.image_path(image), policy="pad", spec=tokenizer.spec)
                    np.testing.assert_array_equal(views.pop(0), expected)
                    seen_images += 1
                begin += length
            assert not views
    assert seen_images > 20


def test_an_empty_micro_batch_has_no_token_and_well_formed_tensors():
    empty = collate([], [], [], image_size=32)
    assert isinstance(empty, PackedBatch)
    assert (empty.num_tokens, empty.num_label_tokens, empty.num_images, empty.segments) == (0, 0, 0, ())
    assert empty.pixels.shape == (0, 3, 32, 32)
    assert empty.input_ids.dtype == empty.targets.dtype == torch.int64
    assert empty.is_image.dtype == torch.bool


def damage(folder: Path, *images: int) -> None:
    for number in images:
        (folder / "img" / f"{number}.png").write_bytes(b"<html>")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_run_with_one_line_that_names_the_record(tmp_path: Path, spec_path: str, workers: int):
    loader = make_loader(tmp_path, spec_path, num_workers=workers)
    damage(tmp_path, 2)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert "data.json#" in message
    assert "2.png: not an image (it starts with b'<html>')" in message
    assert message.endswith("set data.on_bad_sample: quarantine (now: error; 0 quarantined so far).")


@pytest.mark.parametrize("world_size", [1, 2])
def test_quarantine_leaves_bad_records_out_and_names_each_in_its_step(tmp_path: Path, spec_path: str, world_size: int):
    policy = {"on_bad_sample": "quarantine"}
    clean = list(make_loader(tmp_path, spec_path))
    damage(tmp_path, 2)
    steps = [
        list(make_loader(tmp_path, spec_path, data=policy, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    records = json.loads((tmp_path / "data.json").read_text())
    bad = {record["id"] for record in records if "img/2.png" in record.get("image", [])}
    kept = [name for rank in steps for name in samples_of(rank)]
    assert sorted(kept) == sorted(name for name in samples_of(clean) if name not in bad)
    assert len(bad) > 5
    met = [(step.step + 1, name) for step in clean for name in samples_of([step]) if name in bad]
    assert sorted((e.step, e.id) for rank in steps for step in rank for e in step.quarantined) == sorted(met)


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    (tmp_path / "nothing-here").mkdir()
    tokenizer = SampleTokenizer(make_spec(str(tmp_path / "nothing-here")), DataConfig())
    with pytest.raises(ModelError, match=r"nothing-here: cannot be loaded"):
        tokenizer.stop_sequences()


def test_workers_follow_the_cores_unless_told(monkeypatch: pytest.MonkeyPatch):
    assert resolve_num_workers(3) == 3
    for cores, workers in ((1, 0), (2, 0), (4, 2), (8, 4), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert resolve_num_workers("auto") == workers


def long_sample(num_exchanges: int, *, words: int = 12) -> Sample:
    turns = []
    for number in range(num_exchanges):
        turns += [Turn("user", f"<image>\nQuestion {number} " + "why " * words), Turn("assistant", "because " * words)]
    return Sample("x", "test", tuple(turns), tuple(f"{number}.png" for number in range(num_exchanges)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_exchanges=st.integers(1, 6),
    max_tokens=st.integers(20, 400),
    template=st.sampled_from(["llama3", "v1", "llama2"]),
)
def test_truncation_drops_whole_exchanges_and_never_cuts_an_image(
    spec_path: str, num_exchanges: int, max_tokens: int, template: str
):
    sample = long_sample(num_exchanges)
    spec = make_spec(spec_path)
    whole = SampleTokenizer(spec, DataConfig(template=template, max_tokens=100_000)).tokenize(sample)
    tokenizer = SampleTokenizer(spec, DataConfig(template=template, max_tokens=max_tokens))
    if max_tokens <= len(tokenizer.prompt(sample.turns[:1], sample.images[:1])):
        with pytest.raises(DataError, match="no supervised token is left within max_tokens"):
            tokenizer.tokenize(sample)
        return
    cut = tokenizer.tokenize(sample)
    assert len(cut) <= max_tokens
    kept = num_exchanges - cut.dropped_turns // 2
    assert cut.dropped_turns % 2 == 0
    assert cut.images == sample.images[:kept]
    assert int(cut.is_image.sum()) == 4 * kept
    assert cut.num_label_tokens > 0
    same = len(cut) - (0 if cut.dropped_turns == 0 and not cut.cut_tokens else 1)
    assert cut.input_ids[:same].tolist() == whole.input_ids[:same].tolist()
    if cut.cut_tokens:
        assert kept == 1
        assert (
            len(cut) == max_tokens or cut.num_label_tokens == whole.num_label_tokens
        )  # or only what follows the answer
    else:
        more = Sample("x", "test", sample.turns[: 2 * kept + 2], sample.images[: kept + 1])
        longer = SampleTokenizer(spec, DataConfig(template=template, max_tokens=100_000)).tokenize(more)
        assert kept == num_exchanges or len(longer) > max_tokens, "as many exchanges as fit"


def test_cut_answers_have_no_end_token_and_say_how_much_is_gone(spec_path: str):
    sample = long_sample(1, words=40)
    spec = make_spec(spec_path)
    whole = SampleTokenizer(spec, DataConfig(template="llama3", max_tokens=10_000)).tokenize(sample)
    cut = SampleTokenizer(spec, DataConfig(template="llama3", max_tokens=len(whole) - 3)).tokenize(sample)
    assert cut.cut_tokens == 3
    assert cut.input_ids.tolist() == whole.input_ids[:-3].tolist()
    assert whole.input_ids[-1] not in cut.labels.tolist()
    assert cut.labels[-1] == IGNORE_INDEX


def test_what_follows_the_end_token_goes_before_the_end_token(tokenizer_dir: Callable[[str], str]):
    spec = make_spec(tokenizer_dir("chatml"))
    sample = long_sample(1)
    whole = SampleTokenizer(spec, DataConfig(template="chatml", max_tokens=10_000)).tokenize(sample)
    cut = SampleTokenizer(spec, DataConfig(template="chatml", max_tokens=len(whole) - 1)).tokenize(sample)
    assert cut.cut_tokens == 1
    assert cut.num_label_tokens == whole.num_label_tokens


def test_a_tokenizer_travels_to_workers(spec_path: str):
    tokenizer = SampleTokenizer(make_spec(spec_path), DataConfig(template="v1"))
    expected = tokenizer.tokenize(long_sample(2))
    data = pickle.dumps(tokenizer)
    assert len(data) < 5000, "settings only"
    again = pickle.loads(data).tokenize(long_sample(2))
    assert again.input_ids.tolist() == expected.input_ids.tolist()


def mixture_of(folder: Path, records: list[dict[str, Any]], data: DataConfig) -> Mixture[RecordSource]:
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return Mixture([open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)], seed=0)


def test_check_reports_lengths_and_shares(tmp_path: Path, spec_path: str):
    loader = make_loader(tmp_path, spec_path)
    tokenizer = loader._steps.tokenizer
    report = check_supervision(loader._mixture, tokenizer, loader._steps.data, 512)
    source = loader._mixture.sources[0]
    tokenized = [tokenizer.tokenize(source.sample(index)) for index in range(len(source))]
    lengths = [len(sample) for sample in tokenized]
    assert report.samples == 50
    assert report.tokens_max == max(lengths)
    assert report.tokens_mean == pytest.approx(np.mean(lengths))
    assert report.supervised_share == pytest.approx(sum(s.num_label_tokens for s in tokenized) / sum(lengths))
    assert report.images_mean == pytest.approx(np.mean([len(s.images) for s in tokenized]))
    assert report.unsupervised == 0
    assert report.as_dict()["tokens_p50"] == pytest.approx(np.percentile(lengths, 50))


def test_check_refuses_a_dataset_that_cannot_be_learnt_from_and_names_samples(tmp_path: Path, spec_path: str):
    good = [{"id": f"g{n}", "conversations": conversation("why?", "because")} for n in range(196)]
    bad = [{"id": f"b{n}", "conversations": conversation("why? " * 300, "because")} for n in range(4)]
    for policy, records, refused in (
        ("quarantine", good + bad, True),  # 2 %
        ("quarantine", good + bad[:1], False),  # 0.5 %
        ("error", good + bad[:1], True),  # the run would end there
    ):
        data = DataConfig(template="llama3", cache_dir=str(tmp_path), max_tokens=100, on_bad_sample=policy)
        tokenizer = SampleTokenizer(make_spec(spec_path), data)
        mixture = mixture_of(tmp_path, records, data)
        if refused:
            with pytest.raises(
                DataError, match=r'of the first \d+ samples give no supervised token: records\.json#.*"b\d"'
            ):
                check_supervision(mixture, tokenizer, data, 512)
        else:
            assert check_supervision(mixture, tokenizer, data, 512).unsupervised == 1


def test_views_come_from_the_files_of_the_records(tmp_path: Path, spec_path: str):
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "one.png")
    Image.new("RGB", (9, 9), (200, 100, 50)).save(tmp_path / "two.png")
    records = [
        {"id": "x", "image": ["two.png", "one.png"], "conversations": conversation("<image> or <image>?", "this")}
    ]
    data = DataConfig(template="llama3", cache_dir=str(tmp_path))
    mixture = mixture_of(tmp_path, records, data)
    loader = StepLoader(mixture, SampleTokenizer(make_spec(spec_path), data), data, global_batch=1, micro_batch_tokens=100,
                        total_steps=1, num_workers=0)  # fmt: skip
    (step,) = loader
    assert step.micro_batches[0].pixels[:, :, 4, 4].tolist() == [[200, 100, 50], [1, 2, 3]]
