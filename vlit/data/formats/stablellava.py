"""StableLLaVA (arXiv:2308.10253; github.com/icoz69/StableLLAVA): rendered pictures with a dialogue, one file an ability.

``dataset/<ability>.json`` is a list of ``{"id", "image", "prompt", "question", "answer"}``; the question holds
``<image>``, the prompt is what the picture was rendered from. The file's name is the domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlit.data.formats._reader import JsonRecords, an_object, ask, name_of, text_of
from vlit.data.record import Record
from vlit.data.record_checks import read_images, text_field
from vlit.registry import FORMATS


@FORMATS.register("stablellava")
class StableLlavaFormat(JsonRecords):
    """One ability file of StableLLaVA."""

    type: str = "stablellava"

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Question and answer; the rendering prompt is kept as provenance."""
        entry = an_object(entry)
        identity, image = name_of(entry, "id"), name_of(entry, "image")
        turns = ask(text_of(entry, "question"), text_of(entry, "answer"))
        prompt = text_field(entry, "prompt")
        images = read_images({"image": image})
        return Record(
            f"{path.stem}/{identity}", turns, tuple(images), kind=path.stem, domain=path.stem,
            provenance={"image_prompt": prompt} if prompt else {},
        )  # fmt: skip
