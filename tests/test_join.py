"""Single turns about one picture become one conversation; nothing is lost, and each question keeps its answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlit.cli import main
from vlit.data.join import join_turns
from vlit.data.record import Record, Region, check, read_records, write_records
from vlit.errors import ConfigError
from vlit.types import Turn


def ask(name: str, image: str | None, *pairs: tuple[str, str], mark_last: bool = False, **fields: object) -> Record:
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(pairs):
        if number == 0 and image is not None:
            question = f"{question}\n<image>" if mark_last else f"<image>\n{question}"
        turns += [Turn("user", question), Turn("assistant", answer)]
    return Record(name, tuple(turns), () if image is None else (image,), **fields)


def exchanges(record: Record) -> list[tuple[str, str, str]]:
    texts = [turn.text.replace("<image>", "").strip() for turn in record.turns]
    return [("".join(record.images), q, a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


def test_questions_of_a_picture_are_joined_in_order_up_to_the_limit() -> None:
    records = [
        ask("a", "1.png", ("q1", "a1"), kind="vqa", domain="x", provenance={"source": "vqa", "n": 1}),
        ask("b", "2.png", ("q2", "a2"), kind="vqa"),
        ask("c", "1.png", ("q3", "a3"), mark_last=True, kind="vqa", domain="y", provenance={"source": "vqa", "n": 2}),
        ask("d", None, ("q4", "a4")),
        ask("e", "1.png", ("q5", "a5"), ("q6", "a6"), regions=(Region("cat", (0, 0, 1, 1)),)),
        ask("f", "1.png", ("q7", "a7")),
    ]
    joined = list(join_turns(records, at_most=3))
    assert [record.id for record in joined] == ["a", "b", "d", "e"]
    assert [turn.text for turn in joined[0].turns] == ["<image>\nq1", "a1", "q3", "a3"]
    assert (joined[0].kind, joined[0].domain) == ("vqa", None)
    assert joined[0].provenance == {"source": "vqa", "joined": ["a", "c"]}
    assert joined[1] == records[1]
    assert joined[2] == records[3]
    assert [turn.text for turn in joined[3].turns] == ["<image>\nq5", "a5", "q6", "a6", "q7", "a7"]
    assert joined[3].regions == (Region("cat", (0, 0, 1, 1)),)
    for record in joined:
        check(record)


def test_what_cannot_be_joined_is_left_as_it_is() -> None:
    two = Record("two", (Turn("user", "<image><image>\nq"), Turn("assistant", "a")), ("1.png", "1.png"))
    later = Record(
        "later", (Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "<image>"), Turn("assistant", "a")), ("1.png",)
    )  # fmt: skip
    system = Record("system", (Turn("system", "s"), *ask("x", "1.png", ("q", "a")).turns), ("1.png",))
    plain = ask("plain", "1.png", ("q", "a"))
    assert list(join_turns([two, later, system, plain], at_most=9)) == [two, later, system, plain]
    with pytest.raises(ConfigError, match="2 or more"):
        join_turns([plain], at_most=1)


@given(
    st.lists(st.tuples(st.sampled_from(["1.png", "2.png", None]), st.integers(1, 4)), max_size=30),
    st.integers(2, 6),
)
def test_every_exchange_is_there_once_and_no_record_is_too_long(
    shape: list[tuple[str | None, int]], limit: int
) -> None:
    records = [
        ask(f"r{n}", image, *((f"q{n}.{m}", f"a{n}.{m}") for m in range(size))) for n, (image, size) in enumerate(shape)
    ]
    joined = list(join_turns(records, at_most=limit))
    assert sorted(e for r in joined for e in exchanges(r)) == sorted(e for r in records for e in exchanges(r))
    longest = max((size for _, size in shape), default=0)
    assert all(len(record.turns) // 2 <= max(limit, longest) for record in joined)
    assert all(record.turns[0].text.count("<image>") == len(record.images) for record in joined)
    assert len({record.id for record in joined}) == len(joined)


def test_the_command_joins(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [ask(f"r{n}", "1.png", (f"q{n}", f"a{n}")) for n in range(5)])
    assert (
        main(["convert", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--from", "llava", "--join", "3"]) == 0
    )
    assert [len(record.turns) // 2 for record in read_records(tmp_path / "b.jsonl")] == [3, 2]
