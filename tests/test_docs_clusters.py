"""The commands of docs/clusters.md that can run on a small machine are run, exactly as the page has them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT, environment, free_port
from tests.tiny_run import tiny_run

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash tested\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, output folder): one stage of four steps on tiny parts."""
    folder = tmp_path_factory.mktemp("clusters")
    run = tiny_run(tiny_dir, folder / "unused", "stages.instruct=null", "stages.align.max_steps=4")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return config, folder / "out"


def run_block(block: str, workplace: tuple[Path, Path]) -> subprocess.CompletedProcess[str]:
    config, out = workplace
    block = block.replace("29412", str(free_port()))  # another run of this test may use the page's port
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(CONFIG=str(config), OUT=str(out), PATH=path)
    return subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", f"nodes=\n{block}"],
        cwd=ROOT, env=env, text=True, capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_command_of_the_page_runs(number: int, workplace: tuple[Path, Path]) -> None:
    done = run_block(BLOCKS[number], workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "preflight: " in done.stderr
    for folder in re.findall(r'output_dir="\$OUT/(\w+)"', BLOCKS[number]):
        rows = (workplace[1] / folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
        assert (workplace[1] / folder / "align" / "model" / "manifest.json").is_file()


def test_the_page_has_commands_and_they_cover_one_process_two_ranks_and_two_nodes() -> None:
    assert len(BLOCKS) == 5
    text = "\n".join(BLOCKS)
    for part in ("vlit preflight", "vlit train", "--nproc-per-node 2", "--nnodes 2"):
        assert part in text


def test_files_and_options_that_the_page_names_exist() -> None:
    files = set(re.findall(r"(?:scripts|configs)/[\w/]+\.\w+", PAGE))
    assert len(files) >= 6
    for name in files:
        assert (ROOT / name).is_file(), name
    schema = (ROOT / "vlit" / "config" / "schema.py").read_text(encoding="utf-8")
    for key in ("hang_timeout_s", "preflight", "strategy", "keep", "cache_dir", "num_workers"):
        assert f"    {key}:" in schema
