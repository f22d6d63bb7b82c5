"""Similarity by pictures and CLIP: what cannot be decoded is left out or has no value, and changes nothing else."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.spoilt_pictures import SECRET, about, dots, empty, left_out, png, truncated
from vlit.cli import main
from vlit.data.record import read_records, write_records
from vlit.errors import ConfigError
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.settings import read_settings
from vlit.synth.engine.similarity import clip_features
from vlit.synth.quality.models import clip_scores

CLIP = str(Path(__file__).resolve().parent.parent / "vlit" / "synth" / "digits" / "bases" / "clip")


@pytest.mark.parametrize("by", ["image_hash", "clip"])
def test_sets_by_picture_leave_out_what_cannot_be_decoded_or_leads_out(tmp_path: Path, by: str) -> None:
    png(tmp_path / "outside" / "private.png", SECRET)
    for number in range(4):
        dots(tmp_path / "mypics" / f"{number}.png", number)
    truncated(tmp_path / "mypics" / "cut.png")
    names = [f"{n}.png" for n in range(4)] + ["cut.png", str(tmp_path / "outside" / "private.png")]
    write_records(tmp_path / "data.jsonl", [about(name, f"r{place}") for place, name in enumerate(names)])
    raw = {"recipe": {"type": "otter", "by": by, "clip": CLIP}, "records": [str(tmp_path / "data.jsonl")],
           "images": str(tmp_path / "mypics"), "out": str(tmp_path / "out")}  # fmt: skip
    report = run(read_settings(None, raw), show=False)
    made = list(read_records(tmp_path / "out" / "dataset.jsonl"))
    assert [record.id for record in made] == [f"r{n}-in-context" for n in range(4)]
    assert {name for record in made for name in record.images} == set(names[:4])
    assert report.stages[0].rejected == {"picture": 2}
    reasons = left_out(tmp_path)
    assert reasons.keys() == {"r4", "r5"}
    assert "cut.png" in reasons["r4"]
    assert "outside the image folder" in reasons["r5"]


def test_sets_by_picture_follow_a_picture_that_was_replaced(tmp_path: Path) -> None:
    for number, place in enumerate((0, 1, 0, 1)):
        dots(tmp_path / "mypics" / f"{number}.png", place)
    write_records(tmp_path / "data.jsonl", [about(f"{n}.png", f"r{n}") for n in range(4)])
    raw = {"recipe": {"type": "otter", "by": "image_hash", "examples": 1}, "records": [str(tmp_path / "data.jsonl")],
           "images": str(tmp_path / "mypics"), "out": str(tmp_path / "out")}  # fmt: skip

    def examples() -> list[str]:
        run(read_settings(None, raw), show=False)
        return [record.images[0] for record in read_records(tmp_path / "out" / "dataset.jsonl")]

    assert examples() == ["2.png", "3.png", "0.png", "1.png"]
    for number, place in enumerate((0, 0, 1, 1)):
        dots(tmp_path / "mypics" / f"{number}.png", place)
    assert examples() == ["1.png", "0.png", "3.png", "2.png"]


def test_sets_of_nothing_but_damaged_pictures_are_empty_with_reasons(tmp_path: Path) -> None:
    (tmp_path / "mypics").mkdir()
    empty(tmp_path / "mypics" / "a.png")
    write_records(tmp_path / "data.jsonl", [about("a.png", "a"), about("a.png", "b")])
    raw = {"recipe": {"type": "otter", "by": "image_hash"}, "records": [str(tmp_path / "data.jsonl")],
           "images": str(tmp_path / "mypics"), "out": str(tmp_path / "out")}  # fmt: skip
    assert run(read_settings(None, raw), show=False).records == 0
    assert left_out(tmp_path).keys() == {"a", "b"}


def test_clip_features_of_other_pictures_are_the_same_beside_a_damaged_one(tmp_path: Path) -> None:
    for number in range(3):
        dots(tmp_path / "p" / f"{number}.png", number)
    truncated(tmp_path / "p" / "cut.png")
    whole = [str(tmp_path / "p" / f"{number}.png") for number in range(3)]
    mixed = clip_features([whole[0], str(tmp_path / "p" / "cut.png"), *whole[1:]], CLIP, batch=1)
    assert np.isnan(mixed[1]).all()
    np.testing.assert_allclose(mixed[[0, 2, 3]], clip_features(whole, CLIP), atol=1e-5)


def test_clip_scores_are_nan_where_the_picture_is_damaged(tmp_path: Path) -> None:
    dots(tmp_path / "a.png", 1)
    truncated(tmp_path / "cut.png")
    records = [about("a.png", "a"), about("cut.png", "cut")]
    score = clip_scores(records, CLIP, root=tmp_path)[0]["clip_score"]
    assert np.isnan(score).tolist() == [False, True]
    assert score[0] == pytest.approx(clip_scores(records[:1], CLIP, root=tmp_path)[0]["clip_score"][0], abs=1e-5)


def test_a_clip_folder_that_is_none_is_one_error_and_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    dots(tmp_path / "a.png", 1)
    write_records(tmp_path / "data.jsonl", [about("a.png", "a")])
    (tmp_path / "bare").mkdir()
    words = ["synth", "quality", str(tmp_path / "data.jsonl"), "--images", str(tmp_path), "--clip"]
    for folder, why in (("nope", "nope is not a folder"), (str(tmp_path / "bare"), "cannot be read as a CLIP model")):
        assert main([*words, folder]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert why in said
        assert "--clip" in said
    with pytest.raises(ConfigError, match=r"recipe\.clip"):
        clip_features([str(tmp_path / "a.png")], "nope")
