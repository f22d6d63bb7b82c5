"""What trained models say about a dataset, against the same figures computed one record at a time or by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.small_world import small_world
from tests.tiny_run import tiny_run
from vlit.answer import Answerer
from vlit.cli import main
from vlit.data.collate import collate_samples
from vlit.data.formats._base import BadRow, record_of, row_of, sample_of
from vlit.data.formats.llava import LlavaFormat
from vlit.data.images import load_view, mean_colour
from vlit.data.record import Record, read_records, write_records
from vlit.serve.commands import load_answerer
from vlit.synth.digits.instructions import read_captions
from vlit.synth.digits.world import WorldPaths
from vlit.synth.quality.models import clip_scores, clip_texts, losses, spread
from vlit.train.run import run_training
from vlit.types import Turn

CLIP = str(Path(__file__).resolve().parent.parent / "vlit" / "synth" / "digits" / "bases" / "clip")


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, dataset folder): a model of two stages, and mixed records in canonical form."""
    folder = tmp_path_factory.mktemp("models")
    run = tiny_run(tiny_dir, folder / "out")
    run_training(run)
    source = Path(run.stages["instruct"].data[0].path)
    rows = LlavaFormat().iter_rows(source)
    write_records(source.parent / "records.jsonl", (record_of(row) for row in rows if not isinstance(row, BadRow)))
    return folder / "out", source.parent


def alone(answerer: Answerer, record: Record, root: Path, *, blank: bool) -> float:
    """Mean loss of one record: all logits, torch's own cross-entropy, one row."""
    model = answerer.model
    sample = answerer.tokenizer.tokenize(sample_of(row_of(0, record), "x"))
    views = [load_view(root / name, policy="pad", spec=model.spec) for name in record.images]
    if blank:
        colour = np.array(mean_colour(model.spec), np.uint8)[:, None, None]
        views = [np.broadcast_to(colour, view.shape) for view in views]
    batch = collate_samples([sample], views, image_size=model.spec.image_size)
    with torch.no_grad():
        logits = model.logits(batch)[batch.supervised_positions].float()
    return float(torch.nn.functional.cross_entropy(logits, batch.targets))


def test_losses_with_and_without_the_picture_are_those_of_each_record_alone(trained: tuple[Path, Path]) -> None:
    out, root = trained
    records: list[Record | None] = [*read_records(root / "records.jsonl"), None]
    broken = replace(records[0], id="lost", images=("nowhere.png",)) if records[0] else None
    records.append(broken)
    answerer, _ = load_answerer(out, max_new_tokens=1)
    told: list[int] = []
    found = losses(records, answerer, root=root, report=told.append)
    assert sum(told) == len(records) - 1
    assert {len(r.images) for r in records if r} == {0, 1, 2}
    tolerance = 1e-4 if answerer.model.dtype == torch.float32 else 2e-2
    for number, record in enumerate(records[:-2]):
        assert record is not None
        expected = alone(answerer, record, root, blank=False)
        assert found["loss"][number] == pytest.approx(expected, rel=tolerance)
        if record.images:
            blind = alone(answerer, record, root, blank=True)
            assert found["loss_blind"][number] == pytest.approx(blind, rel=tolerance)
            assert found["gain"][number] == pytest.approx(blind - expected, abs=2 * tolerance * blind)
        else:
            assert np.isnan([found["loss_blind"][number], found["gain"][number]]).all()
    assert np.isnan([found[name][-2:] for name in found]).all()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    return small_world(tmp_path_factory.mktemp("clip"), train=150)


def captioned(world: WorldPaths) -> list[Record]:
    captions = read_captions(world.root / "annotations" / "captions_train.json")
    return [
        Record(name, (Turn("user", "<image>\nDescribe."), Turn("assistant", texts[0])), (name,))
        for name, texts in sorted(captions.items())
    ]


def test_clip_score_is_that_of_transformers_own_forward_pass(world: WorldPaths) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    records = captioned(world)[:20]
    no_picture = Record("text", (Turn("user", "Hi."), Turn("assistant", "Hello.")))
    columns, spreads = clip_scores([*records, None, no_picture], CLIP, root=world.images)
    model = CLIPModel.from_pretrained(CLIP).eval()
    pictures = [Image.open(world.images / record.images[0]).convert("RGB") for record in records]
    pixels = AutoImageProcessor.from_pretrained(CLIP)(images=pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(CLIP)(
        [r.turns[1].text for r in records], padding=True, truncation=True,
        max_length=model.config.text_config.max_position_embeddings, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        out = model(pixel_values=pixels["pixel_values"], **{k: tokens[k] for k in ("input_ids", "attention_mask")})
    cosine = (out.logits_per_image / model.logit_scale.exp()).diag().detach().numpy()
    assert columns["clip_score"][:20] == pytest.approx(2.5 * cosine.clip(min=0), abs=2e-3)
    assert np.isnan(columns["clip_score"][20:]).all()
    assert set(spreads) == {"pictures", "answers"}


def test_clip_scores_the_caption_of_a_picture_above_that_of_another(world: WorldPaths) -> None:
    records = captioned(world)
    texts = [record.turns[1].text for record in records]
    Random(0).shuffle(texts)
    wrong = [replace(r, turns=(r.turns[0], Turn("assistant", text))) for r, text in zip(records, texts, strict=True)]
    right, other = (clip_scores(rows, CLIP, root=world.images)[0]["clip_score"] for rows in (records, wrong))
    area = np.mean(right[:, None] > other[None, :])
    assert area > 0.8, f"area under the curve {area:.3f}"


def test_spread_is_the_mean_over_all_pairs() -> None:
    rows = clip_texts([f"a red {n} at the top-left" for n in range(10)], CLIP)
    pairs = [1 - float(rows[a] @ rows[b]) for a in range(10) for b in range(10) if a != b]
    assert spread(rows) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert spread(np.repeat(rows[:1], 5, axis=0)) == pytest.approx(0.0, abs=1e-5)
    assert spread(rows[:1]) == 0.0


def test_the_command_measures_filters_and_shows_what_models_say(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, root = trained
    words = ["synth", "quality", str(root / "records.jsonl"), "--images", str(root), "--out", str(tmp_path / "card")]
    assert main([*words, "--keep", "gain>0"]) == 2
    assert "--model for losses" in capsys.readouterr().err
    assert main([*words, "--model", str(out), "--clip", CLIP, "--keep", "gain>0"]) == 0
    columns = pq.read_table(tmp_path / "card" / "metrics.parquet").to_pydict()
    kept = [record.id for record in read_records(tmp_path / "card" / "kept.jsonl")]
    expected = [i for i, gain in zip(columns["id"], columns["gain"], strict=True) if np.isnan(gain) or gain > 0]
    assert kept == expected
    assert 0 < len(kept) < len(columns["id"])
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["models"]["loss"]["mean"] == pytest.approx(np.mean(columns["loss"]), rel=1e-5)
    assert set(card["models"]["spread"]) == {"pictures", "answers"}
    assert "By trained models" in (tmp_path / "card" / "card.html").read_text(encoding="utf-8")
