"""The report shows the numbers of the run, escapes everything, needs no network, and survives missing or torn files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.html_tools import Element, assert_self_contained, in_chromium, parse
from tests.run_fixture import EVIL, KINDS, make_run
from vlit.serve.charts import Series, line_chart, log_ticks, nice_ticks, smooth, thin
from vlit.serve.markup import Markup, duration, measure, number, percent, short, tag
from vlit.serve.report import write_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "demo")


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Element:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return parse(path.read_text(encoding="utf-8"))


def test_the_report_needs_nothing_outside_itself_and_runs_no_script(report: Element):
    assert_self_contained(report)


def test_texts_of_the_run_are_shown_literally(report: Element):
    assert report.text.count(EVIL) >= 4  # source name, question, prediction, configuration
    assert not [e for e in report.everything() if e.attributes.get("src") == "x"]


def test_headline_tiles_show_accuracy_with_its_interval_and_what_is_possible_blind(report: Element, run_dir: Path):
    results = json.loads((run_dir / "evaluations/digits-test/results.json").read_text())
    tiles = {tile.all("div", "label")[0].text: tile for tile in report.all("div", "tile")}
    lead = tiles["Held-out accuracy"]
    assert lead.all("div", "value")[0].text == f"{100 * results['accuracy']:.1f} %"
    assert lead.all("div", "under")[0].text == (
        f"{100 * results['ci_low']:.1f} % to {100 * results['ci_high']:.1f} % · {results['n']:,} questions"
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    for label, key in [
        ("Without the picture", "blind_accuracy"),
        ("With another picture", "shuffled_image_accuracy"),
        ("After stage 1 only", "stage1_only_accuracy"),
    ]:
        assert tiles[label].all("div", "value")[0].text == f"{100 * summary[key]:.1f} %"
    assert tiles["Time"].all("div", "value")[0].text == "6m 53s"


def test_every_kind_has_a_bar_whose_length_and_whiskers_are_its_numbers(report: Element, run_dir: Path):
    results = json.loads((run_dir / "evaluations/digits-test/results.json").read_text())
    block = report.by_id("evaluation-digits-test")
    bars = {g.all("text")[0].text: g for g in block.all("g")}
    assert set(bars) == {"all", *KINDS}
    axis = {t.text: float(t.attributes["x"]) for t in block.all("text") if t.text.endswith(" %")}
    zero, one = axis["0 %"], axis["100 %"]
    for kind, row in results["per_kind"].items():
        (bar,) = bars[kind].all("rect", "f1")
        assert float(bar.attributes["width"]) == pytest.approx(row["accuracy"] * (one - zero), abs=0.2)
        whisker = bars[kind].all("line", "whisker")[0]
        assert float(whisker.attributes["x1"]) == pytest.approx(zero + row["ci_low"] * (one - zero), abs=0.2)
        assert float(whisker.attributes["x2"]) == pytest.approx(zero + row["ci_high"] * (one - zero), abs=0.2)
        (chance,) = bars[kind].all("line", "chance")
        assert float(chance.attributes["x1"]) == pytest.approx(zero + row["chance"] * (one - zero), abs=0.2)
        (blind,) = bars[kind].all("circle", "hollow")
        wanted = results["rows"]["blind"]["per_kind"][kind]["accuracy"]
        assert float(blind.attributes["cx"]) == pytest.approx(zero + wanted * (one - zero), abs=0.2)


def test_the_number_table_equals_the_results_file(report: Element, run_dir: Path):
    results = json.loads((run_dir / "evaluations/digits-test/results.json").read_text())
    rows = {row[0]: row[1:] for row in report.by_id("evaluation-digits-test").rows()}
    assert set(rows) == {"all", *KINDS}
    for kind, row in results["per_kind"].items():
        shown = [float(x) for x in re.findall(r"[\d.]+", " ".join(rows[kind]))]
        other = [results["rows"][name]["per_kind"][kind]["accuracy"] for name in ("blind", "shuffled")]
        shares = [row["accuracy"], row["ci_low"], row["ci_high"], row["chance"], *other]
        assert shown == pytest.approx([row["n"], *(100 * share for share in shares)], abs=0.051)


def test_sample_cards_match_the_predictions_and_every_kind_with_errors_shows_one(report: Element, run_dir: Path):
    lines = (run_dir / "evaluations/digits-test/predictions.jsonl").read_text().splitlines()
    answers = [row for row in map(json.loads, lines) if row["row"] == "image"]
    cards = report.by_id("evaluation-digits-test").all("div", "sample")
    right = [card for card in cards if card.all("span", "good")]
    wrong = [card for card in cards if card.all("span", "bad")]
    assert len(right) == 8
    assert len(right) + len(wrong) == len(cards)
    kinds_with_errors = {row["kind"] for row in answers if not row["correct"]}
    assert {card.all("span", "badge")[0].text for card in wrong} == kinds_with_errors
    known = {(row["kind"], row["question"], row["prediction"], bool(row["correct"])) for row in answers}
    for card in cards:
        texts = {qa.all("b")[0].text: qa.text.removeprefix(qa.all("b")[0].text) for qa in card.all("div", "qa")}
        kind = card.all("span", "badge")[0].text
        assert (kind, texts["Question"], texts["Answer"], card in right) in known
        assert len(card.all("img")) == 1


def test_loss_curves_end_at_the_values_of_the_files(report: Element, run_dir: Path):
    validation = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    last = {row["stage"]: row["loss"] for row in validation}
    charts = {}
    for figure in report.by_id("training").all("figure"):
        charts.setdefault(figure.all("figcaption")[0].text.split(" ")[0], []).append(figure)
    assert len(charts["Loss"]) == 3  # one a stage, and one by source in the second
    assert {len(charts[name]) for name in ("Learning", "Gradient", "Speed", "Compute")} == {2}
    for stage, figure in zip(("align", "instruct"), (charts["Loss"][0], charts["Loss"][1]), strict=True):
        titles = [t.text for t in figure.all("title")]
        held_out = [t for t in titles if t.startswith("held out")]
        assert len(held_out) == sum(row["stage"] == stage for row in validation)
        assert held_out[-1] == f"held out: {last[stage]:#.3g} at step {200 if stage == 'align' else 900}"


def test_the_parts_table_and_the_data_plan_equal_their_files(report: Element, run_dir: Path):
    parts = json.loads((run_dir / "parts.json").read_text())
    rows = report.by_id("parts").rows()
    wanted = [(p["part"], p["mode"], f"{p['parameters']:,}", f"{p['trainable']:,}") for s in parts.values() for p in s]
    assert [(row[0], row[2], row[3], row[4]) for row in rows] == wanted
    sources = report.by_id("data").rows()
    assert [row[0] for row in sources] == ["captions", "captions", EVIL]
    assert [row[3] for row in sources] == ["100.0 %", "40.0 %", "60.0 %"]  # 8,000 and half of 24,000
    assert sources[2][5] == "3"


def test_answers_during_training_are_listed_by_step(report: Element):
    section = report.by_id("answers")
    assert len(section.all("div", "sample")) == 6
    rows = section.all("div", "sample")[3].rows()  # first record of the second stage
    assert [row[0] for row in rows] == ["100", "300", "400", "600", "700", "900"]
    assert (rows[0][1], rows[-1][1]) == ("the the the", "It is a 0.")


@pytest.mark.parametrize(
    "missing",
    [
        "config.yaml",
        "metrics.jsonl",
        "validation.jsonl",
        "parts.json",
        "data_plan.json",
        "evaluations",
        "summary.json",
        "images",
    ],
)
def test_any_file_may_be_missing(run_dir: Path, tmp_path: Path, missing: str):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / missing) if (copy / missing).is_dir() else (copy / missing).unlink()
    root = parse(write_report(copy).read_text(encoding="utf-8"))
    assert_self_contained(root)
    assert not root.all("div", "note")  # absent is not damaged
    if missing == "images":
        assert len(root.all("div", "no-picture")) > 10


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path):
    assert "holds no results yet" in parse(write_report(tmp_path).read_text()).text


def test_torn_lines_and_nan_losses_are_noted_and_a_repeated_step_counts_once(tmp_path: Path):
    rows = [{"stage": "a", "step": step, "loss": 2.0} for step in (1, 2, 3, 2, 3)] + [
        {"stage": "a", "step": 4, "loss": float("nan")}
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "a", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "summary.json").write_text("[1")
    root = parse(write_report(tmp_path).read_text())
    note = root.all("div", "note")[0].text
    assert "metrics.jsonl: 1 unreadable line(s) left out, first line 7" in note
    assert "summary.json cannot be read" in note
    assert "a: 1 step(s) without a finite loss, first at step 4" in note
    facts = {d.all("dt")[0].text: d.all("dd")[0].text for d in root.all("dl", "facts")[0].all("div")}
    assert facts["Steps"] == "4"


def test_in_chromium_nothing_sticks_out_and_all_pictures_load(run_dir: Path, tmp_path: Path):
    html = write_report(run_dir).read_text(encoding="utf-8")
    shots = []
    for width in (1280, 500):
        shot, seen = in_chromium(html, tmp_path, width=width)
        assert seen["page"] <= seen["window"]
        assert (seen["images"] > 20, seen["broken"]) == (True, 0)
        assert seen["height"] > 2000
        shots.append(np.asarray(Image.open(shot).convert("L")).astype(float))
    assert all(pixels.std() > 10 for pixels in shots)  # not a blank page


def test_markup_escapes_everything_that_is_not_markup():
    made = tag("p", "<b>", Markup("<i>x</i>"), ["&", None, False, 3], cls='a"b', data_x="<")
    assert made == '<p class="a&quot;b" data-x="&lt;">&lt;b&gt;<i>x</i>&amp;3</p>'
    assert tag("img", src="a'b") == '<img src="a&#x27;b"/>'


def test_numbers_are_written_as_a_reader_wants_them():
    assert [number(v) for v in (0, 12345, 0.5, 0.0005, 2e-5, 1234.5, 121.4, float("nan"))] == [
        "0", "12,345", "0.5", "0.0005", "2.0e-5", "1,234", "121.4", "nan",
    ]  # fmt: skip
    assert [measure(v) for v in (2.0, 0.06, 12.34, 99.99, 250.0)] == ["2.00", "0.0600", "12.3", "100", "250"]
    assert [short(v) for v in (999, 1234, 7.06e9)] == ["999", "1.23k", "7.06B"]
    assert [duration(v) for v in (3.21, 185, 15120)] == ["3.2 s", "3m 05s", "4h 12m"]
    assert percent(0.12345) == "12.3 %"


def test_smoothing_keeps_constants_and_follows_lines_without_lag():
    flat = [(float(x), 3.0) for x in range(50)]
    assert [y for _, y in smooth(flat, sigma=4)] == pytest.approx([3.0] * 50)
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in smooth(line, sigma=3)][20:80] == pytest.approx([2.0 * x for x in range(20, 80)])
    noise = [(float(x), y) for x, y in enumerate(np.random.default_rng(0).normal(size=400))]
    assert np.std([y for _, y in smooth(noise, sigma=8)]) < 0.35 * np.std([y for _, y in noise])


def test_thinning_keeps_the_highest_and_the_lowest_point():
    points = [(float(x), 0.0) for x in range(50_000)]
    points[31_234], points[7] = (31_234.0, 9.0), (7.0, -9.0)
    kept = thin(points, most=600)
    assert len(kept) <= 650
    assert {(31_234.0, 9.0), (7.0, -9.0)} <= set(kept)
    assert kept == sorted(kept)


def test_axis_ticks_are_round_and_inside_the_range():
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(3, 897, count=4) == pytest.approx([200, 400, 600, 800])
    assert nice_ticks(5, 5) == [5]
    assert log_ticks(0.05, 3) == pytest.approx([0.1, 0.3, 1, 3])
    assert log_ticks(0.0009, 10) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert log_ticks(1, 13) == pytest.approx([1, 2, 5, 10])


def test_a_chart_without_finite_points_is_left_out():
    assert line_chart("Loss", [Series("train", [(1.0, float("nan"))]), Series("held out", [])]) == ""
