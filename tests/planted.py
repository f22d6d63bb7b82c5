"""A clean dataset from the digits world's annotations, and faults planted into it: what the quality checks must find."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from PIL import Image, ImageEnhance

from vlit.data.record import Record, write_records
from vlit.synth.digits.instructions import read_things
from vlit.synth.digits.questions import KINDS, Thing
from vlit.synth.digits.world import WorldPaths
from vlit.types import Turn

CLEAN_KINDS = ("count", "color", "digit_of_color", "compare", "extreme", "yes_no", "description", "choice")
COLOURS = ("red", "green", "blue", "yellow", "pink", "white")
EVAL_SENTENCES = (
    "Suppose the two numbers in the upper half were exchanged with the ones below them, what would the left column add up to?",
    "If every odd number in this scene were doubled and every even one halved, which of them would then be the largest?",
    "Imagine a visitor who reads the numbers clockwise from the brightest one, which four figures would she write down?",
)


@dataclass
class Planted:
    """Where the dataset lies and which records hold which fault, by id."""

    path: Path
    images: Path
    eval_images: Path
    eval_texts: Path
    annotations: str
    faults: dict[str, set[str]] = field(default_factory=dict)


def ask(identity: str, image: str, question: str, answer: str, kind: str) -> Record:
    """One record of one question."""
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    about = {"license": "CC BY 4.0", "source": "digits", "cost_usd": 0.001}
    return Record(identity, turns, (image,), kind=kind, domain="digits", instruction_type=kind, provenance=about)


def plant(world: WorldPaths, out: Path, *, each: int = 40, seed: int = 0) -> Planted:
    """Write clean records with ``each`` faults of every kind among them, in random order.

    No rewording comes from the code that is tested: questions and answers are written here.
    """
    rng = Random(seed)
    scenes = read_things(world.root / "annotations" / "instances_train.json")
    clean: list[Record] = []
    for number, (image, things) in enumerate(sorted(scenes.items())):
        for kind in rng.sample(CLEAN_KINDS, 3):
            turn = KINDS[kind](things, rng)
            if turn is not None:
                clean.append(ask(f"clean-{number}-{kind}", image, turn.question, turn.answer, kind))
    planted = Planted(out / "data.jsonl", world.images, out / "eval", out / "eval.jsonl", _annotations(world))
    made: list[Record] = []

    def add(fault: str, record: Record) -> None:
        identity = f"{fault}-{len(planted.faults.setdefault(fault, set()))}"
        planted.faults[fault].add(identity)
        made.append(replace(record, id=identity))

    of = {kind: rng.sample([r for r in clean if r.kind == kind], each) for kind in ("count", "color", "description")}
    used = {record.id for records in of.values() for record in records}
    for record in of["count"]:
        things = scenes[record.images[0]]
        wrong = rng.choice([n for n in range(1, 5) if n != len(things)])
        add(
            "wrong_count",
            ask("", record.images[0], "How many digits are in the picture?", f"There {_digits(wrong)}.", "count"),
        )
    for record in of["color"]:
        thing = rng.choice(scenes[record.images[0]])
        wrong = rng.choice([colour for colour in COLOURS if colour != thing.colour])
        question = f"What color is the digit at the {thing.position}?"
        add(
            "wrong_colour",
            ask("", record.images[0], question, f"The digit at the {thing.position} is {wrong}.", "color"),
        )
    for record in rng.sample([r for r in clean if r.id not in used and r.kind != "description"], each):
        add("exact", record)
    free = [image for image in sorted(scenes) if not any(r.images[0] == image and r.id in used for r in clean)]
    for image in rng.sample(free, each):
        first, again = _twice(scenes[image], rng)
        clean.append(ask(f"twin-{image}", image, *first, "twin"))
        add("paraphrase", ask("", image, *again, "twin"))
    for image in rng.sample(free, each):
        thing = rng.choice(scenes[image])
        fact = f"The digit at the {thing.position} is {thing.digit}."
        add("leak", ask("", image, f"{fact} Which digit is at the {thing.position}?", fact, "digit"))
    (out / "eval").mkdir(parents=True)
    tests = sorted((world.images / "test").iterdir())
    (world.images / "mixed").mkdir(exist_ok=True)
    shown = read_things(world.root / "annotations" / "instances_test.json")
    for number, path in enumerate(tests):
        Image.open(path).save(out / "eval" / path.name)
        if number < each:
            name = f"mixed/{number:04d}.jpg"
            _disguise(path, number).save(world.images / name, quality=85)
            add(
                "eval_image",
                ask("", name, "How many digits?", f"There {_digits(len(shown['test/' + path.name]))}.", "count"),
            )
    for number, image in enumerate(rng.sample(free, each)):
        add(
            "eval_text",
            ask("", image, EVAL_SENTENCES[number % 3].replace("?", f" in case {number}?"), "That depends.", "x"),
        )
    planted.eval_texts.write_text("".join(json.dumps({"question": text}) + "\n" for text in EVAL_SENTENCES))
    rng.shuffle(clean)
    rng.shuffle(made)
    write_records(planted.path, [*clean, *made])
    return planted


def _annotations(world: WorldPaths) -> str:
    return f"train/={world.root / 'annotations' / 'instances_train.json'}"


def _digits(number: int) -> str:
    return "is 1 digit" if number == 1 else f"are {number} digits"


def _twice(things: tuple[Thing, ...], rng: Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """The same said twice in other words."""
    thing = rng.choice(things)
    d, c, p = thing.digit, thing.colour, thing.position
    return rng.choice(
        [
            (
                (f"Tell me about the digit at the {p}.", f"At the {p} there is a {d} that is {c}."),
                (f"What can you tell about the {p} digit?", f"It is a {c} {d} and it is at the {p}."),
            ),
            (
                (f"Which digit do you see at the {p}, and in what color?", f"The digit at the {p} is a {c} {d}."),
                (f"At the {p}, which digit can be seen and what color is it?", f"A {c} {d}."),
            ),
            (
                (f"Is the {p} digit painted in {c}? Which one is it?", f"Yes, it is painted in {c}, and it is a {d}."),
                (f"Which {p} digit is it, and is it painted in {c}?", f"It is a {d}, and yes, it is painted in {c}."),
            ),
        ]
    )


def _disguise(path: Path, number: int) -> Image.Image:
    """A picture of an evaluation set as it comes back from elsewhere: resized, brightened, saved as JPEG."""
    image = Image.open(path).convert("RGB")
    if number % 3 == 0:
        return image.resize((96, 96), Image.Resampling.BICUBIC)
    return ImageEnhance.Brightness(image).enhance(1.08) if number % 3 == 1 else image
