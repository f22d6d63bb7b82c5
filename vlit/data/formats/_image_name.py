"""``image_name`` of formats: a pattern such as ``train2014/{id:0>12}.jpg``, looked at when the configuration is read."""

from __future__ import annotations

import string
from typing import Any

from pydantic import AfterValidator

from vlit.errors import did_you_mean


def pattern_of(**examples: Any) -> AfterValidator:
    """For ``Annotated[str, pattern_of(id="1")]``: a pattern that these fields, of the kind of the examples, can fill in."""

    def check(pattern: str) -> str:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
        except ValueError as error:  # a bracket without the other
            raise ValueError(f'pattern "{pattern}": {error}. Known fields: {", ".join(examples)}') from error
        if unknown := [name for name in fields if name not in examples]:
            raise ValueError(f'pattern "{pattern}": unknown field {unknown[0]}. {did_you_mean(unknown[0], examples)}')
        try:
            pattern.format(**examples)
        except (ValueError, LookupError) as error:
            raise ValueError(f'pattern "{pattern}": {error}. Write {{id:0>12}} to fill an id up with zeros') from error
        return pattern

    return AfterValidator(check)
