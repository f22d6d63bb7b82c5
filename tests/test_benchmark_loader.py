"""The loader benchmark runs end to end with small numbers, and its pictures are like photographs."""

from __future__ import annotations

import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import PICTURE_SIZES, POLICIES, make_picture

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_quick_run_measures_everything(tmp_path: Path):
    result = tmp_path / "out" / "loader.json"
    command = [sys.executable, "-m", "benchmarks.loader", "--quick", "--records", "600", "--json", str(result)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    written = json.loads(result.read_text())
    assert {"cpu", "cores", "python", "torch", "pillow", "libjpeg_turbo"} <= written["machine"].keys()

    rows = {row["name"]: row for row in written["rows"]}
    assert len(rows) == len(written["rows"]), "a name is measured twice"
    pictures = [f"{width}x{height}" for width, height in PICTURE_SIZES]
    units = {f"picture/{picture}": "kB" for picture in pictures}
    for picture, policy in itertools.product(pictures, POLICIES):
        for what, unit in (("exact", "images/s"), ("fast", "images/s"), ("psnr", "dB")):
            units[f"load_view/{picture}/{policy}/{what}"] = unit
    units |= {"start/records": "records", "start/file": "MB"}
    units |= {f"start/{what}": "s" for what in ("index_build", "index_cached", "tokenizer", "first_plan", "first_step")}
    for workers in (0, 1):
        units |= {f"loader/workers={workers}/first": "s", f"loader/workers={workers}/records": "records/s"}
        units[f"loader/workers={workers}/images"] = "images/s"
    assert {name: row["unit"] for name, row in rows.items()} == units
    assert all(row["value"] > 0 and math.isfinite(row["value"]) for row in rows.values())
    assert rows["start/records"]["value"] == 600
    for picture, policy in itertools.product(pictures, POLICIES):
        fast, exact, psnr = (
            rows[f"load_view/{picture}/{policy}/{what}"]["value"] for what in ("fast", "exact", "psnr")
        )
        assert fast >= 0.5 * exact
        assert psnr > 45
    for workers in (0, 1):
        images, records = (rows[f"loader/workers={workers}/{what}"]["value"] for what in ("images", "records"))
        assert 0.7 < images / records < 1, "one record in sixteen has no picture"
    assert "load_view, one core" in output.stdout


def test_generated_pictures_hold_the_same_power_in_every_octave():
    pixels = np.asarray(make_picture(512, 384, 1).convert("L"), dtype=np.float64)
    power = np.abs(np.fft.fft2(pixels - pixels.mean())) ** 2
    vertical, horizontal = np.meshgrid(np.fft.fftfreq(384), np.fft.fftfreq(512), indexing="ij")
    frequency = np.hypot(vertical, horizontal)
    octaves = [power[(frequency >= 0.25 / 2**k) & (frequency < 0.5 / 2**k)].sum() / power.sum() for k in range(1, 6)]
    assert max(octaves) < 4 * min(octaves), octaves


def test_generated_pictures_are_reproducible_and_as_large_as_photographs():
    def jpeg(seed: int) -> bytes:
        file = io.BytesIO()
        make_picture(640, 480, seed).save(file, "JPEG", quality=90)
        return file.getvalue()

    assert jpeg(3) == jpeg(3) != jpeg(4)
    assert 90_000 < len(jpeg(3)) < 180_000
