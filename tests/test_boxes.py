"""Box forms: texts as published, exact round trips on every grid, refusals of what is no box."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlit.data.boxes import FORMS, BoxForm, box_form, of_both_sides, of_longer_side
from vlit.data.record import Region
from vlit.errors import DataError

ALL = list(FORMS.values())
PUBLISHED = {
    "llava": "[0.12, 0.30, 0.50, 1.00]",
    "minigpt_v2": "{<12><30><50><100>}",
    "qwen_vl": "<box>(120,300),(500,999)</box>",
    "cogvlm": "[[120,300,500,999]]",
    "ofa": "<bin_120> <bin_300> <bin_500> <bin_999>",
    "shikra": "[0.120,0.300,0.500,1.000]",
}


def corners(form: BoxForm) -> st.SearchStrategy[tuple[float, float, float, float]]:
    levels = st.lists(st.integers(0, form.highest), min_size=4, max_size=4)
    return levels.map(
        lambda b: tuple(v / form.divisor for v in (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
    )


def test_there_are_six_published_forms() -> None:
    assert set(FORMS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_box_is_written_as_published(name: str) -> None:
    assert box_form(name).encode([(0.12, 0.3, 0.5, 1.0)]) == PUBLISHED[name]


@pytest.mark.parametrize("form", ALL, ids=lambda form: f"{form.name}-{form.divisor}")
@given(data=st.data())
def test_boxes_of_the_grid_come_back_exactly(form: BoxForm, data: st.DataObject) -> None:
    boxes = data.draw(st.lists(corners(form), min_size=1, max_size=4))
    text = form.encode(boxes)
    assert form.decode(text) == boxes
    assert form.decode(f"a cat {text} and {text}.") == boxes * 2
    assert form.encode(form.decode(text)) == text


@pytest.mark.parametrize("form", ALL, ids=lambda form: f"{form.name}-{form.divisor}")
@given(data=st.data())
def test_any_box_moves_by_at_most_half_a_step(form: BoxForm, data: st.DataObject) -> None:
    a, b, c, d = data.draw(st.tuples(*[st.floats(0, 1)] * 4))
    box = (min(a, c), min(b, d), max(a, c), max(b, d))
    assert form.decode(form.encode([box])) == [form.snap(box)]
    allowed = (1 if form.highest < form.divisor else 0.5) / form.divisor + 1e-12
    assert all(abs(edge - near) <= allowed for edge, near in zip(box, form.snap(box), strict=True))


def test_ofa_counts_in_512ths_of_the_longer_side() -> None:
    """By OFA's own steps: scale the longer side to 512 pixels, divide both axes by 512, 1000 bins."""
    width, height = 640, 480
    box = (0.25, 0.5, 0.75, 1.0)
    pixels = [edge * size * 512 / 640 for edge, size in zip(box, (width, height, width, height), strict=True)]
    bins = [round(edge / 512 * 999) for edge in pixels]
    assert box_form("ofa").encode([of_longer_side(box, width, height)]) == " ".join(f"<bin_{n}>" for n in bins)
    back = of_both_sides(box_form("ofa").decode(" ".join(f"<bin_{n}>" for n in bins))[0], width, height)
    assert back == pytest.approx(box, abs=0.5 / 999 * 640 / 480)
    assert of_both_sides((0.0, 0.0, 1.0, 0.76), width, height) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["minigpt_v2", "qwen_vl"])
def test_labels_are_read_where_the_form_has_them(name: str) -> None:
    form, box = box_form(name), (0.0, 0.0, 1.0, 1.0)
    text = f"I see {form.name_boxes('a red cup', [box, box])}, and {form.name_boxes('it', [box])}"
    assert form.regions(text) == [Region("a red cup", box), Region("a red cup", box), Region("it", box)]


@given(data=st.data())
def test_a_text_is_rewritten_from_any_form_into_any_other(data: st.DataObject) -> None:
    source, target = data.draw(st.sampled_from(ALL)), data.draw(st.sampled_from(ALL))
    boxes = data.draw(st.lists(corners(source), min_size=1, max_size=2))
    text = source.rewrite(f"There {source.encode(boxes)}!", target)
    assert text == f"There {target.encode(boxes)}!"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("minigpt_v2", "{<10><20><30><101>}"),
        ("minigpt_v2", "{<40><20><30><50>}"),
        ("qwen_vl", "<box>(1,2),(3,1000)</box>"),
        ("llava", "[0.10, 0.20, 1.30, 0.40]"),
    ],
)
def test_numbers_outside_the_grid_are_an_error_that_shows_the_box(name: str, text: str) -> None:
    with pytest.raises(DataError, match=r"box '.*' of form .*: expected numbers from 0 to"):
        box_form(name).decode(text)


def test_lists_that_are_no_boxes_are_left_alone() -> None:
    assert box_form("llava").decode("primes [2, 3, 5, 7], shares [0.1, 0.9]") == []
    assert box_form("shikra").decode("[1,2,3,4]") == []


def test_wrong_calls_say_what_is_wanted() -> None:
    with pytest.raises(DataError, match="x0 <= x1"):
        box_form("llava").encode([(0.5, 0, 0.1, 1)])
    with pytest.raises(DataError, match='Did you mean "cogvlm"'):
        box_form("cogvml")
