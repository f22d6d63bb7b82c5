"""The preview shows what training will really get: the same ids, the same pictures, the same labels, the same rows."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.html_tools import Element, assert_self_contained, in_chromium, parse
from tests.tiny_run import COLOURS, tiny_run, write_dataset
from vlit.config.schema import RunConfig
from vlit.data.images import load_view
from vlit.data.load import StepLoader
from vlit.data.tokenize import SampleTokenizer
from vlit.models.assemble import model_spec
from vlit.serve.preview import build_preview, write_preview
from vlit.serve.preview_data import (
    PreviewImage,
    PreviewRow,
    PreviewSample,
    PreviewSegment,
    PreviewStage,
    PreviewToken,
    collect_preview,
    visible,
)
from vlit.serve.preview_terminal import picture_text, print_preview, row_text, tokens_text
from vlit.train.identity import open_mixture

EVIL = '<img src=x onerror="alert(1)">'


def token(text: str, position: int, *, supervised: bool = False, label: int | None = None) -> PreviewToken:
    return PreviewToken(text, 100 + position, "text", position, supervised, label)


@pytest.fixture
def handmade() -> PreviewStage:
    """``<s> <image x 576> What?\\n`` answered by ``Red.`` and the end token; one broken record; one packed row."""
    tokens = (
        PreviewToken("<s>", 1, "special", 0, False),
        PreviewToken("<image>", 0, "image", 1, False, count=576),
        token(f" What? {EVIL}\n", 577, label=678),
        PreviewToken(" Red", 678, "text", 578, True, label=2),
        PreviewToken("</s>", 2, "special", 579, True),
    )
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., 0] = 200
    good = PreviewSample("a", "src", "f.json#0", tokens, (PreviewImage("r.png", pixels),), (("user", "Why?"),), 3)
    bad = PreviewSample("b", "src", "f.json#1", error=f"no picture {EVIL}")
    row = PreviewRow(0, 1000, (PreviewSegment("a", "src", 580, 576, 2), PreviewSegment("c", "src", 320, 0, 20)), 2)
    return PreviewStage("align", [good, bad], [row], [("Template", "v1")], ["look here"])


@pytest.fixture(scope="module")
def run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Tiny run whose second stage is so short that second exchanges are dropped."""
    settings = ("stages.instruct.max_tokens=120", "stages.instruct.micro_batch_tokens=300")
    return tiny_run(tiny_dir, tmp_path_factory.mktemp("preview"), *settings)


def test_white_space_and_unprintable_characters_are_visible():
    assert visible(" a\tb\n\u200b\u00a0é▁") == "·a⇥b↵\\u200b\\u00a0é▁"


def test_the_page_marks_targets_collapses_images_and_escapes_everything(handmade: PreviewStage):
    root = parse(build_preview([handmade], title="x"))
    assert_self_contained(root)
    (tokens,) = root.all("div", "tokens")
    spans = tokens.all("span", "t")
    assert [s.text for s in spans] == [
        "<s>", "<image> × 576", f"·What?·{visible(EVIL)}↵", "·Red", "</s>", "✂ 3 tokens cut",
    ]  # fmt: skip
    assert ["target" in (s.attributes["class"] or "") for s in spans] == [False, False, False, True, True, False]
    assert spans[1].attributes["title"] == "positions 1 to 576\nlabel: none, its prediction takes no loss"
    assert spans[2].attributes["title"] == "position 577\nid 677\nlabel: must predict 678 ·Red"
    assert len(tokens.all("br")) == 1
    articles = root.all("article")
    assert "580 tokens, 2 supervised (0.3 %)" in articles[0].text
    assert "1 turns dropped" in articles[0].text
    assert "Why?" in articles[0].text
    assert f"no picture {EVIL}" in articles[1].text
    assert "look here" in root.all("div", "note")[0].text


def test_a_sample_without_a_target_is_called_out():
    sample = PreviewSample("a", "s", "p", (token("x", 0), token("y", 1)))
    assert "nothing to learn" in parse(build_preview([PreviewStage("s", [sample], [])])).text


def test_packing_bars_are_as_long_as_their_tokens(handmade: PreviewStage):
    root = parse(build_preview([handmade]))
    (bar,) = [svg for svg in root.all("svg") if (svg.attributes.get("aria-label") or "").startswith("2 samples")]
    (room,) = bar.all("rect", "room")
    whole = float(room.attributes["width"])
    segments = [float(rect.attributes["width"]) for rect in bar.all("rect", "segment")]
    assert segments == pytest.approx([0.58 * whole, 0.32 * whole], abs=0.02)
    pictures = [float(rect.attributes["width"]) for rect in bar.all("rect", "f1")]
    assert pictures == pytest.approx([0.576 * whole, 0.0], abs=0.02)
    assert bar.all("text")[0].text == "90.0 %"


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_collected_tokens_labels_and_pictures_are_the_training_ones(run: RunConfig, stage: str):
    preview = collect_preview(run, stage, samples=12, steps=2)
    spec, data = model_spec(run.model), run.data_for(stage)
    tokenizer = SampleTokenizer(spec, data)
    mixture = open_mixture(run, stage, progress=False)
    assert len(preview.samples) == 12
    pictures = dropped = 0
    for position, shown in enumerate(preview.samples):
        number, record = mixture.record(position)
        source, sample = mixture.sources[number], mixture.sources[number].sample(record)
        tokenized = tokenizer.tokenize(sample)
        ids = [i for t in shown.tokens for i in ([0] * t.count if t.kind == "image" else [t.token_id])]
        assert ids == tokenized.input_ids.tolist()
        labels = {t.position + t.count - 1: t.label for t in shown.tokens if t.label is not None}
        assert labels == {p: int(v) for p, v in enumerate(tokenized.labels) if v != -100}
        assert shown.num_supervised == tokenized.num_label_tokens > 0
        kept = [t.text for t in sample.turns if t.role == "assistant"][
            : (len(sample.turns) - tokenized.dropped_turns) // 2
        ]
        assert "".join(t.text for t in shown.tokens if t.supervised) == "".join(f" {text}</s>" for text in kept)
        assert [text for _, text in shown.dropped] == [
            t.text for t in sample.turns[len(sample.turns) - tokenized.dropped_turns :]
        ]
        for image, name in zip(shown.images, tokenized.images, strict=True):
            view = load_view(source.image_path(name), policy=data.image_policy, spec=spec)
            np.testing.assert_array_equal(image.pixels, view.transpose(1, 2, 0))
            pictures += 1
        dropped += bool(shown.dropped)
    assert pictures > 5
    assert bool(dropped) == (stage == "instruct")


def test_packing_rows_are_the_training_loaders(run: RunConfig):
    preview = collect_preview(run, "instruct", samples=1, steps=3)
    config = run.stages["instruct"]
    loader = StepLoader(
        open_mixture(run, "instruct", progress=False),
        SampleTokenizer(model_spec(run.model), run.data_for("instruct")),
        run.data_for("instruct"),
        global_batch=config.global_batch,
        micro_batch_tokens=config.micro_batch_tokens,
        total_steps=3,
        num_workers=0,
    )
    batches = [(batch.step, row) for batch in loader for row in batch.micro_batches]
    assert [(r.step, r.num_tokens) for r in preview.rows] == [(step, row.num_tokens) for step, row in batches]
    assert [[s.id for s in r.segments] for r in preview.rows] == [list(row.sample_ids) for _, row in batches]
    for shown, (_, row) in zip(preview.rows, batches, strict=True):
        assert sum(s.supervised for s in shown.segments) == row.num_label_tokens > 0
        assert sum(s.image_tokens for s in shown.segments) == int(row.is_image.sum())


def test_a_broken_record_is_shown_with_its_reason_and_the_preview_goes_on(tiny_dir: Path, tmp_path: Path):
    write_dataset(tmp_path / "set")
    for number in range(8):  # more than the opening look at a few pictures finds missing
        (tmp_path / "set" / f"{number:03d}_0.png").write_bytes(b"not a picture")
    data = f'[{{"path": "{tmp_path / "set" / "data.json"}"}}]'
    run = tiny_run(tiny_dir, tmp_path / "out", f"stages.align.data={data}")
    preview = collect_preview(run, "align", samples=24)
    broken = [sample for sample in preview.samples if sample.error]
    assert len(broken) == 6  # records 3 and 7 have no picture
    assert all("not an image" in (sample.error or "") for sample in broken)
    assert any("cannot be packed" in note for note in preview.notes)


def picture_pixels(root: Element) -> list[np.ndarray]:
    sources = [image.attributes["src"] or "" for image in root.all("img")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]


def test_the_written_page_holds_every_stage_and_its_pictures_pixel_by_pixel(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = write_preview(run, stages=["align", "instruct"], samples=4, out=tmp_path / "new" / "preview.html")
    root = parse(out.read_text(encoding="utf-8"))
    assert_self_contained(root)
    shown = picture_pixels(root.by_id("stage-align"))
    wanted = [image.pixels for sample in collect_preview(run, "align", samples=4).samples for image in sample.images]
    assert len(shown) == len(wanted) > 0
    for left, right in zip(shown, wanted, strict=True):
        np.testing.assert_array_equal(left, right)
    assert len(root.by_id("stage-instruct").all("article")) == 4
    printed = capsys.readouterr().out
    assert "stage align" in printed
    assert "stage instruct" in printed
    assert "[</s>]" in printed  # without colours, targets stand in brackets


def test_terminal_tokens_name_what_takes_loss_with_and_without_colours(handmade: PreviewStage):
    plain = tokens_text(handmade.samples[0], coloured=False).plain
    assert plain.startswith("<s>|<image x 576>|·What?·")
    assert plain.endswith("[·Red][</s>] [3 tokens cut]")
    styled = tokens_text(handmade.samples[0])
    highlighted = [styled.plain[span.start : span.end] for span in styled.spans if "on " in str(span.style)]
    assert highlighted == ["·Red", "</s>"]


def test_the_terminal_shows_errors_drops_pictures_and_rows(handmade: PreviewStage):
    console = Console(record=True, width=100, force_terminal=True, color_system="truecolor", file=io.StringIO())
    print_preview(handmade, console=console)
    text = console.export_text()
    for words in (
        "look here",
        "no picture <img",
        "dropped, user: Why?",
        "90.0 %  2 samples",
        "580 tokens, 2 supervised",
    ):
        assert words in text
    assert text.count("▀") >= 32 * 16


def test_terminal_pictures_and_rows_are_drawn_to_scale():
    pixels = np.full((40, 80, 3), COLOURS["red"], np.uint8)
    text = picture_text(pixels, cells=20)
    assert text.plain == "\n".join(["▀" * 20] * 5)
    assert all("#dc1e1e on #dc1e1e" in str(span.style) for span in text.spans)
    row = PreviewRow(4, 100, (PreviewSegment("a", "s", 50, 0, 1), PreviewSegment("b", "s", 25, 5, 1)), 2)
    assert re.fullmatch(r"step  5  █{30}▓{15}·{15}   75\.0 %  2 samples", row_text(row).plain)


def test_the_preview_fits_a_narrow_window_in_chromium(handmade: PreviewStage, tmp_path: Path):
    _, seen = in_chromium(build_preview([handmade]), tmp_path, width=500, height=1200)
    assert seen["page"] <= seen["window"]
    assert (seen["images"], seen["broken"]) == (1, 0)
