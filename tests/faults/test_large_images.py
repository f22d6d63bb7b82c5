"""Pictures of very many pixels, claimed or real: refused by the header, or worked on within a bounded amount of memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.test_images import POLICIES, ROOT, SPEC, chunk, encoded, png, smooth
from vlit.data import image_modes, image_resize
from vlit.data.images import load_view

BOMBS = {
    "png": png(20_000, 20_000),
    "jpeg": encoded(Image.new("RGB", (8, 8)), "JPEG").replace(b"\x00\x08\x00\x08\x03", b"\x4e\x20\x4e\x20\x03"),
    "gif": (lambda g: g[:6] + b"\x20\x4e\x20\x4e" + g[10:])(encoded(Image.new("P", (8, 8)), "GIF")),
    "bmp": (lambda b: b[:18] + struct.pack("<ii", 20_000, 20_000) + b[26:])(encoded(Image.new("RGB", (8, 8)), "BMP")),
    "text": png(9, 9, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))),  # 200 MB of text in 200 kB
}


PEAK_OF_A_VIEW = """
import json, resource, sys
from pathlib import Path
from tests.data_fixtures import make_spec
from vlit.data import image_modes, image_resize
from vlit.data.images import load_view
from vlit.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

import torch  # the fast way needs it
before, words = peak(), ""
for policy, exact in (("pad", False), ("pad", True), ("crop", False)):
    try:
        load_view(Path(sys.argv[1]), policy=policy, spec=make_spec("none", image_size=56), exact=exact)
    except DataError as error:
        words = str(error)
print(json.dumps([words, (peak() - before) / 1024]))
"""


def peak_of_views(path: Path) -> tuple[str, float]:
    """The refusal, if any, and the megabytes that three ways to a view need at most; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_VIEW, str(path)], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    message, megabytes = json.loads(done.stdout)
    return message, megabytes


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_claims_to_be_huge_is_refused_without_the_memory_for_it(tmp_path: Path, name: str):
    path = tmp_path / f"bomb.{name}"
    path.write_bytes(BOMBS[name])
    message, megabytes = peak_of_views(path)
    assert f"bomb.{name}" in message
    assert name == "text" or "pixels" in message
    assert megabytes < 100


@pytest.mark.parametrize("size", [(6_700, 6_700), (23_000, 2_000), (2_000, 23_000)])
def test_large_pictures_need_a_bounded_multiple_of_their_pixels(tmp_path: Path, size: tuple[int, int]):
    """GIF files of 800 bytes with 45 million pixels; the square around the long ones has 530 million."""
    content = encoded(Image.new("P", (8, 8)), "GIF")
    path = tmp_path / "large.gif"
    path.write_bytes(content[:6] + struct.pack("<HH", *size) + content[10:])
    message, megabytes = peak_of_views(path)
    assert message == ""
    assert megabytes < 700


@pytest.mark.parametrize("size", [(150, 90), (90, 150), (400, 20), (20, 400)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "P", "F"])
def test_large_pictures_worked_on_in_strips_give_the_same_view(
    tmp_path: Path, size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
):
    grey = np.asarray(smooth(*size).convert("L"))
    picture = {"I;16": Image.fromarray(grey.astype(np.uint16) * 257), "F": Image.fromarray(grey / np.float32(255))}.get(
        mode
    )
    path = tmp_path / ("x.tiff" if mode == "F" else "x.png")
    (picture or smooth(*size).convert(mode)).save(path)
    whole = {policy: load_view(path, policy=policy, spec=SPEC, exact=True) for policy in POLICIES}
    for module in (image_modes, image_resize):
        monkeypatch.setattr(module, "LARGE", 1000)
    for policy in POLICIES:
        strips = load_view(path, policy=policy, spec=SPEC, exact=True)
        assert np.abs(strips.astype(int) - whole[policy]).max() <= 1, policy
