"""The offline image generator: draws what a prompt says about digits, with the embedded world's renderer.

It understands phrases ``a red 7 at the top-left`` and nothing else; a prompt without one is refused, not guessed at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlit.registry import GENERATORS
from vlit.synth.digits.scenes import COLOUR_NAMES, POSITIONS
from vlit.synth.engine.images import GeneratorConfig, ImageGenerator
from vlit.synth.engine.parse import Rejected, shorten
from vlit.synth.engine.views import Thing, View

PHRASE = re.compile(rf"\ban? ({'|'.join(COLOUR_NAMES)}) (\d)\)* at the ({'|'.join(POSITIONS)})", flags=re.IGNORECASE)


def digits_of_prompt(prompt: str) -> list[tuple[str, str, str]]:
    """(colour, digit, position) of every phrase; the first one counts where two name the same place."""
    places: dict[str, tuple[str, str, str]] = {}
    for match in PHRASE.finditer(prompt):
        colour, digit, place = (part.lower() for part in match.groups())
        places.setdefault(place, (colour, digit, place))
    return list(places.values())


def view_of_prompt(prompt: str) -> View:
    """What a prompt says, as a view; each digit's box is its quadrant."""
    things = []
    for colour, digit, place in digits_of_prompt(prompt):
        row, column = divmod(POSITIONS.index(place), 2)
        box = (0.5 * column, 0.5 * row, 0.5 * column + 0.5, 0.5 * row + 0.5)
        things.append(Thing(digit, box, {"color": colour}))
    return View("prompt", "", (), tuple(things))


@GENERATORS.register("digits")
class DigitsGeneratorConfig(GeneratorConfig):
    """Scenes of handwritten digits, 64 x 64 pixels."""

    type: str = "digits"

    def build(self, **kwargs: Any) -> DigitsGenerator:
        """The generator."""
        return DigitsGenerator()


class DigitsGenerator(ImageGenerator):
    """Training handwriting only, so that generated pictures never show held-out scans."""

    abilities = "digits"

    def generate(self, prompt: str, target: Path, *, seed: int) -> None:
        import numpy as np
        from PIL import Image

        from vlit.synth.digits import scenes

        wanted = digits_of_prompt(prompt)
        if not wanted:
            raise Rejected(
                "prompt", f"the digits generator draws 'a red 7 at the top-left'; {shorten(prompt)} has no such phrase"
            )
        rng = np.random.default_rng(seed)
        drawn = scenes.draw_layouts("train", 1, rng=rng)
        for part in (drawn.digits_NQ, drawn.colours_NQ, drawn.sources_NQ):
            part[:] = -1
        targets = scenes._scans()[1]
        scans = scenes.handwriting()["train"]
        for colour, digit, place in wanted:
            quadrant = POSITIONS.index(place)
            drawn.digits_NQ[0, quadrant] = int(digit)
            drawn.colours_NQ[0, quadrant] = COLOUR_NAMES.index(colour)
            drawn.sources_NQ[0, quadrant] = rng.choice(scans[targets[scans] == int(digit)])
        Image.fromarray(scenes.render(drawn, rng=rng)[0]).save(target)
