"""The page of faults is complete and true: every case once, every test it names exists and says what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_CASES = 52


def rows() -> list[list[str]]:
    """Cells of the table: number, fault, what happens, tests or reason."""
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| \d+ \|", line)]


def names_in(path: Path) -> set[str]:
    """Names of the test functions of a file, read without importing it."""
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_case_stands_once_in_the_table_with_words_in_each_cell():
    found = rows()
    assert [int(row[0]) for row in found] == list(range(1, NUM_CASES + 1))
    for row in found:
        assert len(row) == 4, row
        assert all(len(cell) >= 5 for cell in row[1:]), row


def test_every_case_has_an_existing_test_or_a_reason():
    named = 0
    for number, *_, cell in rows():
        references = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)
        assert cell.count("`tests/") == len(references), f"case {number}: a reference has another form than file::test"
        reason = re.sub(r"`tests/[^`]+`|<br>", "", cell).strip()
        assert references or len(reason) > 40, f"case {number} has neither a test nor a reason"
        for file, test in references:
            assert (ROOT / file).is_file(), f"case {number}: no file {file}"
            assert test in names_in(ROOT / file), f"case {number}: {file} has no {test}"
            named += 1
    assert named > NUM_CASES
