"""A mention is no claim: what may be, would be, is compared, depicted or quoted is not said to be there."""

from __future__ import annotations

from random import Random

import pytest

from vlit.data.record import Record
from vlit.synth.engine.embedded import DOMAINS, converse, domain_pair
from vlit.synth.engine.views import Thing as Seen
from vlit.synth.engine.views import View
from vlit.synth.quality.annotations import Annotations, Thing
from vlit.synth.quality.correctness import Agreement, agreement_of, leaks
from vlit.types import Turn

SCENE = (
    Thing("person", "person", "", (0.1, 0.1, 0.4, 0.9)),
    Thing("person", "person", "", (0.5, 0.1, 0.8, 0.9)),
    Thing("cat", "animal", "", (0.6, 0.6, 0.9, 0.9)),
    Thing("bench", "outdoor", "", (0.1, 0.5, 0.9, 0.95)),
    Thing("pizza", "food", "", (0.4, 0.4, 0.5, 0.5)),
    Thing("train", "vehicle", "", (0.0, 0.1, 0.3, 0.3)),
    Thing("tv", "electronic", "", (0.7, 0.1, 0.9, 0.2)),
)
LABELS = (
    "person", "cat", "bench", "pizza", "train", "tv", "dog", "bear", "bus", "chair", "couch", "orange", "apple", "broccoli",
    "clock", "elephant", "mouse", "sink", "bottle", "car", "oven", "book", "dining table", "hot dog",
)  # fmt: skip
TRUE = (
    ("What is in the picture?", "An orange cat sits on the bench."),
    ("What is in the picture?", "An orange and white cat sits on the bench, next to an orange bag."),
    ("What might happen next?", "The two people may be waiting for a bus."),
    ("What are they doing?", "Two people are waiting for a bus."),
    ("What could they do after the meal?", "They could take the cat for a walk or play with a dog."),
    ("Why is the bench useful?", "It offers a place to sit, unlike a chair, which has to be carried."),
    ("What should the people keep in mind?", "They should bear in mind that the train leaves soon."),
    ("What do they do?", "They bear in mind that the train leaves soon."),
    ("What do they want?", "They want to book a room."),
    ("What are they watching?", "They are watching tv. It could be a program about an elephant."),
    ("Is the food healthy?", "Pizza is less healthy than broccoli or an apple."),
    ("What is the person wearing?", "The person wears a shirt with a picture of a bear."),
    ("What kind of place is it?", "It looks like a train station with a clock tower far away."),
    ("What is far away?", "A clock tower stands behind the bus stop."),
    ("How many people are there?", "There are two people."),
    ("How many people are there?", "Two."),
    ("What is there?", "There are two people, a cat, and a pizza."),
    ("Is there a dog?", "No, there is no dog in the picture."),
    ("What is missing?", "The picture does not contain any cars."),
    ("What is it like?", "The cat looks as big as a bear."),
    ("What does the sign say?", "It says 'no dogs allowed'."),
    ("What does the sign say?", 'The sign reads "Beware of the dog".'),
    ("What is the cat's toy?", "It is a toy mouse."),
    ("What do people sit on?", "They sit on a park bench instead of a couch."),
    ("Are there more people or cats?", "There are more people than cats."),
    ("Is there one person?", "No, there are two people."),
    ("How many animals are there?", "There is one animal, a cat."),
    ("What would you need to clean up?", "You would need a sink and a bottle of soap."),
    ("What is it?", "The person on the left holds a slice of pizza."),
    ("What comes to your mind?", "An orange bus would look nice here, but there is none."),
    ("What comes to your mind?", "Nothing here reminds of a kitchen with an oven."),
    ("What comes to your mind?", "If there were a dog, the cat would leave."),
)
FALSE = (
    "A dog lies on the bench.",
    "The cat sits next to an apple.",
    "There is a dog, a bench and a pizza.",
    "A person holds a bottle of soap.",
    "Two people stand behind a bus.",
    "In the picture, a bear walks by.",
    "People sit on chairs as well as on a bench.",
    "An orange lies beside the pizza.",
    "The dining table is covered with food.",
    "A dog can be seen, which may be asleep.",
    "A person sits on a couch, and the cat may be hungry.",
    "The person eats a hot dog.",
)


def agreement(question: str, answer: str) -> Agreement:
    known = Annotations({"p.jpg": SCENE})
    for label in LABELS:
        known.add_name("label", label)
    for group in ("animal", "food", "vehicle", "outdoor", "electronic"):
        known.add_name("group", group)
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return agreement_of(Record("x", turns, ("p.jpg",)), known)


@pytest.mark.parametrize(("question", "answer"), TRUE)
def test_a_true_sentence_that_mentions_what_is_absent_is_not_wrong(question: str, answer: str) -> None:
    assert +agreement(question, answer).wrong == {}


def test_most_true_sentences_still_make_a_claim() -> None:
    assert sum(bool(+agreement(*said).claims) for said in TRUE) >= 0.5 * len(TRUE)


@pytest.mark.parametrize("answer", FALSE)
def test_an_assertion_of_what_is_absent_is_wrong(answer: str) -> None:
    assert agreement("What is in the picture?", answer).wrong["exists"] == 1


def scene(rng: Random) -> View:
    names = rng.sample([label for label in LABELS if label != "orange"], 4)
    things = []
    for name in names:
        x, y = rng.uniform(0, 0.7), rng.uniform(0, 0.7)
        colour = {"color": rng.choice(("red", "green", "blue"))} if rng.random() < 0.5 else {}
        things.append(Seen(name, (x, y, x + rng.uniform(0.05, 0.3), y + rng.uniform(0.05, 0.3)), colour))
    return View("x", "p.jpg", (), tuple(things))


def test_true_answers_of_the_embedded_teacher_never_leak() -> None:
    rng = Random(0)
    looked: set[str] = set()
    for _ in range(150):
        view = scene(rng)
        for domain in DOMAINS:
            for kind in ("short", "long"):
                pair = domain_pair(view, domain, kind, rng)
                if pair is not None:
                    looked.add(domain)
                    assert not leaks(pair.question, pair.answer), pair
        for pair in converse(view, rng):
            assert not leaks(pair.question, pair.answer), pair
    assert looked == set(DOMAINS)
