"""The commands of docs/data-engine.md are run in order, exactly as the page has them; the endpoint is a server of this test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.teacher_server import running
from vlit.data.record import read_records
from vlit.registry import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "data-engine.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash tested\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_commands_of_the_page_run_and_each_data_set_holds_valid_records(tmp_path: Path) -> None:
    assert len(BLOCKS) == 5
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        Image.new("RGB", (32, 32), (number * 10, 50, 50)).save(tmp_path / "pictures" / f"{number}.png")
    with running(faults={"429": 0.1}) as server:
        environment = os.environ | {
            "OUT": str(tmp_path), "PICTURES": str(tmp_path / "pictures"),
            "ENDPOINT": server.url, "TEACHER_KEY": "sk-0123456789",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        for block in BLOCKS:
            done = subprocess.run(
                ["bash", "-eu", "-o", "pipefail", "-c", block], cwd=ROOT, env=environment, text=True, capture_output=True,
                timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        assert set(server.accounts.good.values()) == {1}
        assert len(server.accounts.good) == 24 + 48  # captions, then two domains a picture; the first 20 were reused
    for name in ("llava", "mine", "adapt", "minigpt4", "mminstruct", "stablellava", "otter"):
        records = list(read_records(tmp_path / name / "dataset.jsonl"))
        assert len(records) >= 10, name
        assert len({record.id for record in records}) == len(records)
        folder = {"mine": tmp_path / "pictures", "stablellava": tmp_path / "stablellava/images"}.get(
            name, tmp_path / "world/images"
        )
        assert all((folder / image).is_file() for record in records for image in record.images), name
    steps = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3]


SHORTER = {
    "vlit synth build": ("--no-review", "max_items=60"),
    "torchrun scripts/train.py --config configs/stage2_built.yaml": (
        "stages.align.max_steps=2", "stages.instruct.max_steps=2", "stages.instruct.validation.every_steps=2",
    ),
    "vlit eval --checkpoint outputs/built --benchmark digits": ("max_questions=13",),
}  # fmt: skip
"""The commands that the page begins with, and words that make them short enough to be tested."""


@pytest.mark.slow
def test_the_commands_that_the_page_begins_with_lead_from_nothing_to_a_model_and_its_score(tmp_path: Path) -> None:
    opening = PAGE.split("## One command")[1].split("```bash tested")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", opening, flags=re.MULTILINE | re.DOTALL)
    assert [line.split("#")[0].strip() for block in blocks for line in block.splitlines()] == list(SHORTER)
    for name in ("configs", "scripts", "vlit"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for line, words in SHORTER.items():
        done = subprocess.run(
            [*line.split(), *words], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "outputs"
    assert (out / "build" / "quality" / "card.html").is_file()
    assert len(list(read_records(out / "build" / "train.jsonl"))) > 100
    results = json.loads(next((out / "built" / "evaluations").glob("*/results.json")).read_text())
    assert results["n"] == 13


def test_the_page_names_every_recipe_and_existing_options() -> None:
    table = PAGE.split("## Recipes")[1].split("```")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(RECIPES.names())
    text = (ROOT / "vlit" / "serve" / "synth_options.py").read_text(encoding="utf-8")
    for option in set(re.findall(r"(?<=\s)--[a-z-]+", "\n".join(BLOCKS))) - {"--config", "--recipe"}:
        assert f'"{option}"' in text, option
