"""The log of a review: decisions that survive, export, agreement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.review_fixture import call, serving
from vlit.cli import main
from vlit.data.record import read_records, write_records
from vlit.errors import DataError
from vlit.serve.review.agreement import agreement_table, cohen_kappa
from vlit.serve.review.command import export_reviews, open_server
from vlit.serve.review.dataset import Reviewed
from vlit.serve.review.log import DecisionLog

pytest_plugins = ["tests.review_fixture"]


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    for row in range(3):
        log.decide("a", row, "d", "accept")
    log.undo("a")
    log.close()
    whole = log.path.read_bytes()
    for cut in range(len(whole)):
        log.path.write_bytes(whole[:cut])
        again = DecisionLog(log.path)
        lines = whole[:cut].count(b"\n")
        assert len(again.by_record()) == (2 if lines == 4 else lines)
        again.decide("b", 7, "d", "reject")
        again.close()
        assert all(json.loads(line) for line in log.path.read_bytes().splitlines())
    log.path.write_bytes(b"garbage\n" + whole)
    with pytest.raises(DataError, match="line 1 is not a decision"):
        DecisionLog(log.path)


def test_undo_goes_back_to_the_decision_before(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.decide("a", 0, "d", "accept")
    log.decide("b", 0, "d", "reject")
    log.decide("a", 0, "d", "edit", ["x"])
    for expected in ("accept", None):
        assert log.undo("a") is not None
        last = log.last("a", 0)
        assert (last.action if last else None) == expected
    assert log.undo("a") is None
    log.close()
    again = DecisionLog(log.path, write=False)
    assert again.by_record().keys() == {0}
    assert again.reviewers() == ["b"]


def test_who_accepts_a_record_they_edited_keeps_the_edit_unless_it_is_undone(dataset: Path, tmp_path: Path) -> None:
    def exported(row: int) -> list[str]:
        export_reviews(dataset, out=tmp_path / "out.jsonl")
        records = {record.id: record for record in read_records(tmp_path / "out.jsonl")}
        return [turn.text for turn in records[f"r{row}"].turns] if f"r{row}" in records else []

    original = [[turn.text for turn in record.turns] for record in read_records(dataset)]
    with serving(dataset) as server:

        def decide(reviewer: str, row: int, action: str, *turns: str) -> list[str]:
            body = {"reviewer": reviewer, "row": row, "action": action, "turns": list(turns)}
            assert call(server, "/api/decide", body)[0] == 200
            return [turn["text"] for turn in call(server, f"/api/record?row={row}&reviewer={reviewer}")[1]["turns"]]

        question, other = original[0][0], original[1][0]
        assert decide("a", 0, "edit", question, "Mended.") == [question, "Mended."]
        assert decide("a", 0, "reject") == decide("a", 0, "accept") == [question, "Mended."]
        decide("a", 1, "edit", other, "By a.")
        decide("b", 1, "edit", other, "By b.")
        decide("a", 1, "accept")
        decide("c", 2, "accept")
        assert exported(0) == [question, "Mended."]
        assert exported(1) == [other, "By b."]  # the last edit
        assert exported(2) == original[2]
        for _ in range(2):
            call(server, "/api/undo", {"reviewer": "a"})
        call(server, "/api/undo", {"reviewer": "b"})
        assert exported(1) == []
        for _ in range(3):
            call(server, "/api/undo", {"reviewer": "a"})
        assert decide("a", 0, "accept") == exported(0) == original[0]


def test_export_leaves_out_what_one_rejects_and_refuses_a_changed_file(dataset: Path, tmp_path: Path) -> None:
    with serving(dataset) as server:
        for said in ("a 0 accept", "b 0 reject", "a 1 accept", "b 1 accept", "b 2 reject"):
            reviewer, row, action = said.split()
            assert call(server, "/api/decide", {"reviewer": reviewer, "row": int(row), "action": action})[0] == 200
        assert main(["synth", "review", str(dataset), "--export", str(tmp_path / "out.jsonl")]) == 0  # while it is open
    records = list(read_records(tmp_path / "out.jsonl"))
    assert [record.id for record in records] == ["r1"]
    assert records[0].provenance["review"]["reviewers"] == ["a", "b"]
    original = list(read_records(dataset))
    assert replace(records[0], provenance={}) == original[1]
    write_records(dataset, [original[0], replace(original[1], kind="other"), *original[2:]])
    with pytest.raises(DataError, match="changed since"):
        export_reviews(dataset, out=tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()


@pytest.mark.parametrize("command", [
    "review {data} --export {data}", "review {data} --export {folder}/x/../data.jsonl", "review {data} --export {link}",
    "review {data} --export {hard}", "review {data} --export {log}", "review {data} --export {folder}",
    "review {data} --log {folder}", "review {data} --log {link}", "review {data} --log {folder}/data.accepted.jsonl",
    "quality {data} --keep clean --write {data}", "quality {data} --write {link}", "quality {hard} --write {data}",
    "quality {folder}/kept.jsonl --keep answer_words>=1 --out {folder}", "quality {data} --write {folder}",
])  # fmt: skip
def test_no_file_that_is_read_is_written_over(
    command: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "data.reviews.jsonl").write_bytes(b"")
    (tmp_path / "link.jsonl").symlink_to(dataset)
    (tmp_path / "hard.jsonl").hardlink_to(dataset)
    (tmp_path / "kept.jsonl").write_bytes(dataset.read_bytes())
    held = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    names = {"data": dataset, "folder": tmp_path, "link": tmp_path / "link.jsonl", "hard": tmp_path / "hard.jsonl",
             "log": tmp_path / "data.reviews.jsonl"}  # fmt: skip
    words = [word.format(**names) for word in command.split()]
    assert main(["synth", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --")
    assert said.count("\n") == 1
    assert "must not be overwritten" in said or "a folder. Give a file." in said
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == held


def test_scores_of_the_quality_card_are_found_beside_the_dataset(dataset: Path) -> None:
    from vlit.serve.quality import measure_quality

    measure_quality(dataset, workers=1)
    with serving(dataset) as server:
        rows = call(server, "/api/rows?reviewer=a")[1]
        assert len(rows["scores"]["quality"]) == rows["records"] == 8
    write_records(dataset, list(read_records(dataset))[:3])
    with pytest.raises(DataError, match="8 rows"):
        open_server(dataset)


def test_files_that_cannot_be_reviewed_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is not a record"):
        Reviewed(tmp_path / "a.jsonl", images=tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no records"):
        Reviewed(tmp_path / "a.jsonl", images=tmp_path)


def test_kappa_equals_scikit_learn() -> None:
    from random import Random

    from sklearn.metrics import cohen_kappa_score

    rng = Random(0)
    for size in (2, 5, 50):
        left, right = (rng.choices(["accept", "edit", "reject"], k=size) for _ in range(2))
        if len({*left, *right}) > 1:
            assert cohen_kappa(zip(left, right, strict=True)) == pytest.approx(cohen_kappa_score(left, right))
    assert cohen_kappa([]) is None
    assert cohen_kappa([("accept", "accept")]) == 1
    rows = agreement_table(
        {0: {"a": "accept", "b": "accept"}, 1: {"a": "reject", "b": "accept"}, 2: {"a": "accept", "c": "edit"}}
    )
    assert [(row["a"], row["b"], row["records"]) for row in rows] == [("a", "b", 2), ("a", "c", 1)]
