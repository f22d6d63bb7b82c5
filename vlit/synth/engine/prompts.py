"""Prompts are text files with a version, in our own words; what they say is part of every cache key.

``prompts/<recipe>/<name>.v<N>.txt`` holds a whole chat: sections that begin with a line ``=== system``, ``=== user`` or ``===
assistant``; worked examples are earlier turns, the last user section is the question, with ``$placeholders`` (those that vlit's
own file has, in it and in the system section; ``$$`` is a dollar sign). Lines before the first section are notes. A list
(``read_list``) is one entry a line. The highest version is used. A folder of one's own that mirrors the tree goes before the
files that come with vlit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, cast

from vlit.errors import DataError, did_you_mean
from vlit.synth.engine.teacher import Message
from vlit.types import Role

FOLDER = Path(__file__).with_name("prompts")
SECTION = re.compile(r"^=== (system|user|assistant)[ \t]*$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A chat with placeholders. ``version`` changes with every byte of the file."""

    version: str
    sections: tuple[tuple[Role, str], ...]

    def messages(self, images: Sequence[str] = (), **values: Any) -> tuple[Message, ...]:
        """The chat with its placeholders filled in; pictures go with the last message."""
        filled = []
        for number, (role, text) in enumerate(self.sections):
            said = Template(text).substitute(values) if self._is_filled(number) else text
            shown = tuple(images) if number == len(self.sections) - 1 else ()
            filled.append(Message(role, said, shown))
        return tuple(filled)

    def templates(self) -> list[str]:
        """The texts whose placeholders are filled in: of the system, and the last."""
        return [text for number, (_, text) in enumerate(self.sections) if self._is_filled(number)]

    def _is_filled(self, number: int) -> bool:
        return number == len(self.sections) - 1 or self.sections[number][0] == "system"


def find(name: str, *, own: str | None = None) -> Path:
    """The file of the highest version of ``recipe/name``; DataError with the known names."""
    for folder in ([Path(own)] if own else []) + [FOLDER]:
        held = [p for p in (folder / name).parent.glob(f"{Path(name).name}.v*.*") if _version(p) is not None]
        if held:
            return max(held, key=lambda p: _version(p) or 0)
    raise DataError(f'prompt "{name}": no such file. {did_you_mean(name, _names(FOLDER))}')


def check_own(folder: Path) -> None:
    """ValueError unless a folder of one's own holds a file that takes the place of one of vlit's."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the folder of your prompt files, or leave the key out")
    held = _names(folder)
    if not held & _names(FOLDER):
        has = f"it holds {', '.join(sorted(held)[:5])}" if held else "it holds no file like llava/conversation.v1.txt"
        raise ValueError(f"{folder}: none of its files takes the place of a prompt of vlit ({has}). Known: "
                         f"{', '.join(sorted(_names(FOLDER)))}")  # fmt: skip


def _names(folder: Path) -> set[str]:
    """``recipe/name`` of every prompt file below."""
    return {p.relative_to(folder).as_posix().split(".v")[0] for p in folder.rglob("*.v*.*") if _version(p) is not None}


def _version(path: Path) -> int | None:
    found = re.search(r"\.v(\d+)\.\w+$", path.name)
    return int(found[1]) if found else None


def version_of(*paths: Path) -> str:
    """Names and content hash of files, for cache keys."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return f"{'+'.join(path.stem for path in paths)}:{digest[:12]}"


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error


def _check_placeholders(name: str, path: Path, texts: Iterable[str]) -> None:
    """DataError where a text has a ``$`` that is none of the placeholders of vlit's own file ``name``."""
    if name not in _names(FOLDER):
        return
    known = {match["named"] or match["braced"] for match in Template.pattern.finditer(_text_of(find(name)))} - {None}
    for text in texts:
        for match in Template.pattern.finditer(text):
            word = match["named"] or match["braced"]
            if match["escaped"] is None and word not in known:
                shown = text[match.start() :].split(maxsplit=1)[0]
                hint = did_you_mean(word or "", known) or "It has none."
                raise DataError(f'{path}: "{shown}" is no placeholder here. {hint} Write $$ for a dollar sign.')


def read_prompt(name: str, *, own: str | None = None) -> Prompt:
    """The chat of ``recipe/name``.

    Raises:
        DataError: it has no sections, does not end with the user, is not UTF-8, or has a placeholder that nothing fills.
    """
    path = find(name, own=own)
    parts = SECTION.split(_text_of(path))
    sections = tuple((cast(Role, parts[n]), parts[n + 1].strip()) for n in range(1, len(parts), 2))
    if not sections or sections[-1][0] != "user":
        raise DataError(
            f"{path}: a prompt needs sections (=== system, === user, === assistant) and ends with === user."
        )
    prompt = Prompt(version_of(path), sections)
    _check_placeholders(name, path, prompt.templates())
    return prompt


def read_list(name: str, *, own: str | None = None, is_filled: bool = False) -> tuple[list[str], str]:
    """(entries, version) of a list: one a line; ``#`` begins a note; ``\\n`` in a line is a line break; ``""`` is an
    entry without words.

    Raises:
        DataError: it is empty, is not UTF-8, or has a placeholder that nothing fills although it ``is_filled``.
    """
    path = find(name, own=own)
    lines = (line.strip() for line in _text_of(path).splitlines())
    entries = ["" if line == '""' else line.replace("\\n", "\n") for line in lines if line and not line.startswith("#")]
    if not entries:
        raise DataError(f"{path}: the list is empty. Write one entry a line.")
    if is_filled:
        _check_placeholders(name, path, entries)
    return entries, version_of(path)


def read_groups(name: str, *, own: str | None = None) -> tuple[dict[str, list[str]], str]:
    """(entries by group, version) of a list whose groups begin with a line ``[name]``."""
    lines, version = read_list(name, own=own)
    groups: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("[") and line.endswith("]"):
            groups[line[1:-1]] = current = []
        elif not groups:
            raise DataError(f"{find(name, own=own)}: {line!r} stands before the first [group].")
        else:
            current.append(line)
    return groups, version
