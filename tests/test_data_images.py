"""Image decoding and policies, against transformers' CLIP processor, LLaVA's padding rule and hand-made pixels; the fast
way against the exact one on photographs.
"""

from __future__ import annotations

import io
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data_fixtures import make_spec
from vlit.data import images as module
from vlit.data.images import Policy, load_view, mean_colour, open_rgb, resolve_image
from vlit.errors import DataError

SPEC = make_spec("none", image_size=56)
GREY = (122, 116, 104)
POLICIES: list[Policy] = ["pad", "crop", "squash"]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that resampling differences would show."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y / 5)], -1) * 100 + 128
    return Image.fromarray(np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8))


def save(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (56, 56), (57, 200), (1000, 60), (30, 20), (333, 334)])
def test_crop_equals_transformers_clip_processor(tmp_path: Path, size: tuple[int, int]):
    from transformers import CLIPImageProcessorPil

    path = save(tmp_path, picture(*size))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(Image.open(path), do_rescale=False, do_normalize=False)["pixel_values"][0]
    view = load_view(path, policy="crop", spec=SPEC, exact=True)
    assert view.dtype == np.uint8
    assert view.shape == (3, 56, 56)
    np.testing.assert_array_equal(view, np.asarray(expected))


@pytest.mark.parametrize("size", [(640, 480), (481, 640), (57, 200), (30, 20), (20, 30), (1201, 903)])
def test_pad_equals_llavas_square_then_clip_processor(tmp_path: Path, size: tuple[int, int]):
    from transformers import CLIPImageProcessorPil

    path = save(tmp_path, picture(*size))
    width, height = size
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = GREY
    left, top = (side - width) // 2, (side - height) // 2
    square[top : top + height, left : left + width] = np.asarray(Image.open(path))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(Image.fromarray(square), do_rescale=False, do_normalize=False)["pixel_values"][0]
    view = load_view(path, policy="pad", spec=SPEC, exact=True)
    np.testing.assert_array_equal(view, np.asarray(expected))


def test_squash_resizes_both_sides(tmp_path: Path):
    path = save(tmp_path, picture(100, 40))
    expected = np.asarray(picture(100, 40).resize((56, 56), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_view(path, policy="squash", spec=SPEC, exact=True), expected)
    bilinear = make_spec("none", image_size=56, resample="bilinear")
    expected = np.asarray(picture(100, 40).resize((56, 56), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_view(path, policy="squash", spec=bilinear, exact=True), expected)


def test_mean_colour_is_llavas():
    assert mean_colour(SPEC) == GREY
    assert mean_colour(make_spec("none", image_mean=(0.5, 0.5, 0.5))) == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_upright_picture(tmp_path: Path, orientation: int):
    upright = picture(40, 24)
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, stored, exif=exif)
    np.testing.assert_array_equal(np.asarray(open_rgb(path, background=GREY)), np.asarray(upright))


def rgb(path: Path) -> np.ndarray:
    return np.asarray(open_rgb(path, background=GREY))


def test_modes_are_converted_by_the_documented_rules(tmp_path: Path):
    base = picture(12, 10)
    pixels = np.asarray(base)
    np.testing.assert_array_equal(rgb(save(tmp_path, base)), pixels)

    grey = np.asarray(base.convert("L"))
    np.testing.assert_array_equal(rgb(save(tmp_path, Image.fromarray(grey))), grey[..., None].repeat(3, -1))

    bits = base.convert("1")
    np.testing.assert_array_equal(rgb(save(tmp_path, bits)), np.asarray(bits.convert("RGB")))

    deep = (grey.astype(np.uint16) * 257).astype(np.uint16)  # 8 bits spread over 16
    np.testing.assert_array_equal(rgb(save(tmp_path, Image.fromarray(deep))), grey[..., None].repeat(3, -1))
    floats = Image.fromarray((grey / 255).astype(np.float32))
    np.testing.assert_array_equal(rgb(save(tmp_path, floats, "f.tiff")), grey[..., None].repeat(3, -1))

    alpha = np.zeros((10, 12), np.uint8)
    alpha[:, 6:] = 255
    rgba = np.dstack([pixels, alpha])
    expected = pixels.copy()
    expected[:, :6] = GREY
    np.testing.assert_array_equal(rgb(save(tmp_path, Image.fromarray(rgba))), expected)
    la = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    expected = grey[..., None].repeat(3, -1)
    expected[:, :6] = GREY
    np.testing.assert_array_equal(rgb(save(tmp_path, la)), expected)

    palette = Image.new("P", (4, 2))
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    palette.putdata([0, 1, 0, 1, 1, 0, 1, 0])
    assert rgb(save(tmp_path, palette))[0, :2].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert rgb(save(tmp_path, palette, transparency=1))[0, :2].tolist() == [[255, 0, 0], list(GREY)]

    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = rgb(save(tmp_path, cmyk, "a.jpg", quality=95))[4, 4]
    assert red[0] > 240
    assert max(red[1:]) < 15


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp"):
        path = tmp_path / name
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert rgb(path)[0, 0].tolist() == [255, 0, 0], name


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (20000, 10)])
@pytest.mark.parametrize("policy", POLICIES)
def test_extreme_shapes_give_a_view_of_the_right_size(tmp_path: Path, size: tuple[int, int], policy: Policy):
    for path in (save(tmp_path, Image.new("RGB", size, (9, 200, 30)), name) for name in ("a.png", "a.jpg")):
        for exact in (False, True):
            view = load_view(path, policy=policy, spec=SPEC, exact=exact)
            assert view.shape == (3, 56, 56)
            close = np.abs(view[:, 28, 28] - np.array([9, 200, 30])).max() <= (2 if path.suffix == ".jpg" else 0)
            assert close or policy == "pad"


@pytest.mark.parametrize("exact", [False, True])
def test_files_that_are_no_images_are_refused_by_name(tmp_path: Path, exact: bool):
    jpeg = io.BytesIO()
    picture(500, 400).save(jpeg, "JPEG")  # large enough to be decoded reduced
    whole = jpeg.getvalue()
    cases = {
        "zero.jpg": (b"", "the file is empty"),
        "page.jpg": (b"<!DOCTYPE html><html>", "it starts with b'<!DOCTYPE ht"),
        "half.jpg": (whole[: len(whole) // 2], "cannot be decoded"),
        "tenth.jpg": (whole[: len(whole) // 10], "not an image|cannot be decoded"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*({words})"):
            load_view(tmp_path / name, policy="pad", spec=SPEC, exact=exact)
    with pytest.raises(DataError, match=r"absent\.jpg: the image does not exist"):
        load_view(tmp_path / "absent.jpg", policy="pad", spec=SPEC, exact=exact)
    with pytest.raises(DataError, match=r"folder|cannot be decoded"):
        load_view(tmp_path, policy="pad", spec=SPEC, exact=exact)


def test_a_decompression_bomb_is_refused_before_its_pixels_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
        )

    monkeypatch.setattr(module.Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    for side in (14_000, 60_000):  # above our limit; above PIL's own
        (tmp_path / "bomb.png").write_bytes(png(side, side))
        with pytest.raises(DataError, match=r"bomb\.png: .*pixels"):
            load_view(tmp_path / "bomb.png", policy="pad", spec=SPEC)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """640 x 427: fine texture and sharp edges. scikit-learn ships it; importing that takes seconds, so its file is read."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    return Image.open(Path(package.origin).parent / "datasets" / "images" / "china.jpg").convert("RGB")


def levels(path: Path, policy: Policy, size: int) -> np.ndarray:
    """How far the fast view is from the exact one."""
    spec = make_spec("none", image_size=size)
    fast, exact = (load_view(path, policy=policy, spec=spec, exact=exact) for exact in (False, True))
    assert fast.dtype == exact.dtype == np.uint8
    assert fast.shape == exact.shape == (3, size, size)
    assert fast.flags.c_contiguous
    assert exact.flags.c_contiguous
    return fast.astype(int) - exact


def psnr(difference: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (301, 288), (200, 200), (150, 90)])
def test_the_fast_resize_is_within_rounding_of_the_exact_one(
    tmp_path: Path, photo: Image.Image, size: tuple[int, int], policy: Policy
):
    path = save(tmp_path, photo.resize(size), "a.jpg", quality=90)
    difference = levels(path, policy, 224)
    tall_squash = policy == "squash" and size == (427, 640)  # PIL resizes columns first, torch rows
    assert psnr(difference) > (54 if tall_squash else 70)
    assert np.abs(difference).mean() < (0.25 if tall_squash else 0.01)
    assert difference.any(), "the fast way was not taken"


def test_the_exact_view_of_a_large_jpeg_is_made_from_all_its_pixels(tmp_path: Path):
    path = save(tmp_path, picture(800, 600), "a.jpg")
    upright = Image.open(path)
    square = Image.new("RGB", (800, 800), GREY)
    square.paste(upright, (0, 100))
    pictures = {"squash": upright, "pad": square, "crop": upright.resize((74, 56), Image.Resampling.BICUBIC)}
    for policy in POLICIES:
        expected = pictures[policy]
        expected = expected.crop((9, 0, 65, 56)) if policy == "crop" else expected.resize((56, 56))
        view = load_view(path, policy=policy, spec=SPEC, exact=True)
        np.testing.assert_array_equal(view.transpose(1, 2, 0), np.asarray(expected), err_msg=policy)


def test_views_of_their_own_size_are_the_files_pixels(tmp_path: Path):
    path = save(tmp_path, picture(56, 56))
    for exact, policy in [(exact, policy) for exact in (False, True) for policy in POLICIES]:
        view = load_view(path, policy=policy, spec=SPEC, exact=exact)
        np.testing.assert_array_equal(view.transpose(1, 2, 0), np.asarray(picture(56, 56)))


DRAFTS: dict[str, tuple[tuple[int, int], str, int, dict[str, object]]] = {
    # name: size as people see it, mode, EXIF orientation, options of the file
    "even": ((1200, 896), "RGB", 1, {}),
    "odd": ((1203, 901), "RGB", 1, {}),
    "odd and tall": ((901, 1301), "RGB", 1, {}),
    "rotated": ((896, 1200), "RGB", 6, {}),
    "upside down": ((1200, 896), "RGB", 3, {}),
    "grey": ((1201, 899), "L", 1, {}),
    "cmyk": ((1201, 899), "CMYK", 1, {}),
    "progressive": ((1201, 899), "RGB", 1, {"progressive": True, "subsampling": 0}),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DRAFTS)
def test_reduced_decoding_stays_close_to_the_exact_view(tmp_path: Path, photo: Image.Image, name: str, policy: Policy):
    size, mode, orientation, options = DRAFTS[name]
    undo = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    stored = photo.resize(size, Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = stored if undo is None else stored.transpose(undo)
    path = save(tmp_path, stored, "a.jpg", quality=90, exif=exif, **options)

    decoded = open_rgb(path, background=GREY, at_least=224 * 2, side="long" if policy == "pad" else "short")
    assert decoded.size == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    difference = levels(path, policy, 224)
    assert 43 < psnr(difference) < 65, "above 65 dB, the view was made from all pixels"
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize(
    ("size", "options", "wanted", "side", "expected"),
    [
        ((800, 600), {}, 300, "short", (400, 300)),
        ((800, 600), {}, 301, "short", (800, 600)),
        ((800, 600), {}, 301, "long", (400, 300)),
        ((800, 600), {}, 100, "long", (100, 75)),
        ((800, 600), {}, 10, "long", (100, 75)),
        ((801, 603), {}, 150, "short", (201, 151)),
        ((801, 604), {"orientation": 6}, 150, "short", (604, 801)),  # 801 has no half
        ((804, 602), {"orientation": 6}, 150, "short", (301, 402)),  # 602 has no quarter
        ((800, 600), {"orientation": 8}, 150, "short", (150, 200)),
        ((1600, 50), {}, 2, "long", (1600, 50)),  # a strip
        ((800, 600), {"format": "PNG"}, 100, "long", (800, 600)),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_its_side_allows(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], wanted: int, side: Any, expected: tuple[int, int]
):
    exif = Image.Exif()
    exif[0x0112] = options.get("orientation", 1)
    path = save(tmp_path, picture(*size), "a.img", format=options.get("format", "JPEG"), exif=exif)
    whole = open_rgb(path, background=GREY)
    assert whole.size == (size[::-1] if options.get("orientation", 1) > 4 else size)
    assert open_rgb(path, background=GREY, at_least=wanted, side=side).size == expected


def test_the_first_picture_of_a_multi_picture_jpeg_is_reduced(tmp_path: Path):
    frames = [Image.new("RGB", (800, 600), colour) for colour in ("red", "lime")]
    path = tmp_path / "phone.jpg"
    frames[0].save(path, format="MPO", save_all=True, append_images=frames[1:])
    decoded = open_rgb(path, background=GREY, at_least=300)
    assert decoded.size == (400, 300)
    assert decoded.getpixel((200, 150)) == (254, 0, 0)


def test_paths_stay_inside_the_image_folder(tmp_path: Path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    assert resolve_image("sub/a.jpg", root) == root / "sub" / "a.jpg"
    assert resolve_image(str(root / "a.jpg"), root) == root / "a.jpg"
    for image in (
        "../a.jpg",
        "sub/../../a.jpg",
        "/etc/passwd",
        str(root / ".." / "a.jpg"),
        str(tmp_path / "images2" / "a"),
    ):
        with pytest.raises(DataError, match="image folder"):
            resolve_image(image, root)
