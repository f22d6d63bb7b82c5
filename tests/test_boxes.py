"""Box forms: texts as published, exact round trips on every grid, refusals of what is no box."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vlit.data.boxes import FORMS, BoxForm, box_form
from vlit.data.record import Region
from vlit.errors import DataError
from vlit.registry import FORMATS

ALL = list(FORMS.values())
SQUARE = (640.0, 640.0)
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
    assert box_form(name).encode([(0.12, 0.3, 0.5, 1.0)], SQUARE) == PUBLISHED[name]


@pytest.mark.parametrize("form", ALL, ids=lambda form: f"{form.name}-{form.divisor}")
@given(data=st.data())
def test_boxes_of_the_grid_come_back_exactly(form: BoxForm, data: st.DataObject) -> None:
    boxes = data.draw(st.lists(corners(form), min_size=1, max_size=4))
    text = form.encode(boxes, SQUARE)
    assert form.decode(text, SQUARE) == boxes
    assert form.decode(f"a cat {text} and {text}.", SQUARE) == boxes * 2
    assert form.encode(form.decode(text, SQUARE), SQUARE) == text


@pytest.mark.parametrize("form", ALL, ids=lambda form: f"{form.name}-{form.divisor}")
@given(data=st.data())
def test_any_box_moves_by_at_most_half_a_step(form: BoxForm, data: st.DataObject) -> None:
    a, b, c, d = data.draw(st.tuples(*[st.floats(0, 1)] * 4))
    box = (min(a, c), min(b, d), max(a, c), max(b, d))
    assert form.decode(form.encode([box], SQUARE), SQUARE) == [form.snap(box, SQUARE)]
    allowed = (1 if form.highest < form.divisor else 0.5) / form.divisor + 1e-12
    assert all(abs(edge - near) <= allowed for edge, near in zip(box, form.snap(box, SQUARE), strict=True))


def test_ofa_counts_in_512ths_of_the_longer_side() -> None:
    """By OFA's own steps: scale the longer side to 512 pixels, divide both axes by 512, 1000 bins."""
    width, height = 640, 480
    box = (0.25, 0.5, 0.75, 1.0)
    pixels = [edge * size * 512 / 640 for edge, size in zip(box, (width, height, width, height), strict=True)]
    bins = [round(edge / 512 * 999) for edge in pixels]
    text = " ".join(f"<bin_{n}>" for n in bins)
    assert box_form("ofa").encode([box], (width, height)) == text
    (back,) = box_form("ofa").decode(text, (width, height))
    assert back == pytest.approx(box, abs=0.5 / 999 * 640 / 480)
    assert back == box_form("ofa").snap(box, (width, height))
    over = "<bin_0> <bin_0> <bin_999> <bin_760>"
    assert box_form("ofa").decode(over, (width, height)) == [(0.0, 0.0, 1.0, 1.0)]
    assert box_form("ofa").rewrite(over, box_form("llava"), (width, height)) == "[0.00, 0.00, 1.00, 1.00]"


def test_shares_of_the_longer_side_are_not_guessed_where_no_size_is_known() -> None:
    ofa, qwen, text = box_form("ofa"), box_form("qwen_vl"), "<bin_0> <bin_0> <bin_999> <bin_749>"
    for call in (
        lambda: ofa.encode([(0, 0, 1, 1)]),
        lambda: ofa.decode(text),
        lambda: ofa.rewrite(text, qwen),
        lambda: qwen.rewrite(PUBLISHED["qwen_vl"], ofa),
    ):
        with pytest.raises(DataError, match="of form ofa are shares of the picture's longer side"):
            call()
    with pytest.raises(ValidationError, match=r"do not say how large a picture is\. Choose one of: keep, llava,"):
        FORMATS.get("qwen_vl")(type="qwen_vl", boxes="ofa")


@pytest.mark.parametrize("name", ["minigpt_v2", "qwen_vl"])
def test_labels_are_read_where_the_form_has_them(name: str) -> None:
    form, box = box_form(name), (0.0, 0.0, 1.0, 1.0)
    text = f"I see {form.name_boxes('a red cup', [box, box])}, and {form.name_boxes('it', [box])}"
    assert form.regions(text) == [Region("a red cup", box), Region("a red cup", box), Region("it", box)]


@given(data=st.data())
def test_a_text_is_rewritten_from_any_form_into_any_other(data: st.DataObject) -> None:
    source, target = data.draw(st.sampled_from(ALL)), data.draw(st.sampled_from(ALL))
    boxes = data.draw(st.lists(corners(source), min_size=1, max_size=2))
    text = source.rewrite(f"There {source.encode(boxes, SQUARE)}!", target, SQUARE)
    assert text == f"There {target.encode(boxes, SQUARE)}!"


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
