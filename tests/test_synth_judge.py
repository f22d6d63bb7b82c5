"""A second teacher's verdicts: read strictly, kept with the record, and measured by the quality card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.teacher_server import running
from vlit.cli import main
from vlit.data.record import Record, read_records, write_records
from vlit.errors import ConfigError
from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.settings import read_settings
from vlit.synth.recipes.judge import exchanges_text, read_verdicts
from vlit.types import Turn


def dataset(folder: Path) -> list[Record]:
    """Three records of one to three answers, two pictures, one without; answers with "blue" are wrong to the judge."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(folder / name)

    def said(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
        return tuple(Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))

    return [
        Record(
            "one", said(("<image>\nWhat colour?", "It is red.")), ("a.png",), kind="k", provenance={"recipe": "llava"}
        ),
        Record(
            "two", said(("<image>\nIs it?", "No, blue."), ("Sure?", "Yes."), ("And now?", "A blue one.")), ("b.png",)
        ),
        Record("three", (Turn("system", "Be brief."), *said(("Two and two?", "Four."))), ()),
    ]


def test_verdicts_stay_with_their_records_and_become_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLIT_TEST_KEY", "sk-test-0123456789")
    records = dataset(tmp_path)
    write_records(tmp_path / "data.jsonl", records)
    with running(keep=True) as server:
        raw: dict[str, Any] = {
            "recipe": "judge", "records": [str(tmp_path / "data.jsonl")], "images": str(tmp_path),
            "out": str(tmp_path / "out"),
            "teacher": {"type": "openai", "base_url": server.url, "model": "m", "key_env": "VLIT_TEST_KEY"},
        }  # fmt: skip
        assert run(read_settings(None, raw), show=False).records == 3
        assert len(server.accounts.bodies) == 3
        pictures = [json.dumps(body).count('image_url": {') for body in server.accounts.bodies]
        assert sorted(pictures) == [0, 1, 1]
    judged = list(read_records(tmp_path / "out" / "dataset.jsonl"))
    assert [(r.id, r.turns, r.images, r.kind) for r in judged] == [(r.id, r.turns, r.images, r.kind) for r in records]
    verdicts = [record.provenance["judge"] for record in judged]
    assert [(v["agree"], v["of"]) for v in verdicts] == [(1, 1), (1, 3), (1, 1)]
    assert verdicts[1]["against"] == {"1": "nothing blue is to be seen", "3": "nothing blue is to be seen"}
    assert judged[0].provenance["recipe"] == "llava"

    words = ["synth", "quality", str(tmp_path / "out" / "dataset.jsonl"), "--images", str(tmp_path)]
    assert main([*words, "--keep", "judged>=0.5"]) == 0
    folder = tmp_path / "out" / "dataset.quality"
    assert [record.id for record in read_records(folder / "kept.jsonl")] == ["one", "three"]
    card = json.loads((folder / "card.json").read_text())
    assert card["correctness"]["judged"] == {"mean": pytest.approx((1 + 1 / 3 + 1) / 3), "records": 3}
    assert "A second teacher agrees with 77.8 %" in (folder / "card.html").read_text(encoding="utf-8")


def test_the_judge_runs_from_the_command_line_and_its_estimate_is_what_it_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path / "data.jsonl", dataset(tmp_path))
    out = tmp_path / "out"
    words = [
        "--recipe",
        "judge",
        "--records",
        str(tmp_path / "data.jsonl"),
        "--images",
        str(tmp_path),
        "--out",
        str(out),
    ]
    with running() as server:
        words += ["--teacher", "openai", f"teacher.base_url={server.url}", "teacher.model=m"]
        words += ["teacher.usd_per_million_in=1", "teacher.usd_per_million_out=4"]
        assert main(["synth", "estimate", "--json", *words]) == 0
        before = json.loads(capsys.readouterr().out)
        assert server.accounts.requests == 0
        assert main(["synth", "run", "--yes", *words]) == 0
        assert [stage["requests"] for stage in before["stages"]] == [server.accounts.requests] == [3]
    shown = capsys.readouterr().err
    assert "judge     3 requests" in shown
    assert "(3 records)" in shown
    assert [record.provenance["judge"]["agree"] for record in read_records(out / "dataset.jsonl")] == [1, 1, 1]
    assert json.loads((out / "report.json").read_text())["cost_usd"] <= before["most_usd"]


def test_the_judge_sees_questions_and_answers_in_order() -> None:
    record = Record(
        "x", (Turn("system", "Be brief."), Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."), Turn("user", "Why?"),
              Turn("assistant", "It is.")), ("a.png",),
    )  # fmt: skip
    assert exchanges_text(record) == (
        "Instruction: Be brief.\n1. Question: What?\n   Answer: A cat.\n2. Question: Why?\n   Answer: It is."
    )


def test_verdicts_are_read_in_the_forms_that_models_write() -> None:
    assert read_verdicts("1: right\n2. Wrong - it is red.\n\n3) WRONG", answers=3) == {1: None, 2: "it is red.", 3: ""}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1: right", "verdicts for 1, expected 1 to 2"),
        ("1: right\n3: right", "verdicts for 1, 3, expected 1 to 2"),
        ("2: right\n1: right", "verdicts for 2, 1, expected 1 to 2"),
        ("Both are right.", "no verdict"),
        ("1: right\n2: rightly so", "no verdict"),
    ],
)
def test_other_replies_are_rejected(text: str, why: str) -> None:
    with pytest.raises(Rejected, match=why):
        read_verdicts(text, answers=2)


def test_without_records_or_with_the_embedded_teacher_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe judge: needs finished records"):
        run(read_settings(None, {"recipe": "judge", "out": str(tmp_path / "out")}), show=False)
    write_records(tmp_path / "data.jsonl", dataset(tmp_path))
    raw = {
        "recipe": "judge",
        "records": [str(tmp_path / "data.jsonl")],
        "images": str(tmp_path),
        "out": str(tmp_path / "o"),
    }
    with pytest.raises(ConfigError, match='teacher annotations: cannot do the task "judge"'):
        run(read_settings(None, raw), show=False)
