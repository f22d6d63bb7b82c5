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
    assert len(BLOCKS) == 4
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


def test_the_page_names_every_recipe_and_existing_options() -> None:
    table = PAGE.split("## Recipes")[1].split("```")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(RECIPES.names())
    text = (ROOT / "vlit" / "serve" / "synth_options.py").read_text(encoding="utf-8")
    for option in set(re.findall(r"(?<=\s)--[a-z-]+", "\n".join(BLOCKS))) - {"--config", "--recipe"}:
        assert f'"{option}"' in text, option
