"""Prompts are text files with a version, in our own words; what they say is part of every cache key.

``prompts/<recipe>/<name>.v<N>.txt`` holds a whole chat: sections that begin with a line ``=== system``, ``=== user`` or ``===
assistant``; worked examples are earlier turns, the last user section is the question, with ``$placeholders``. Lines before the
first section are notes. A list (``read_list``) is one entry a line. The highest version is used. A folder of one's own that
mirrors the tree goes before the files that come with vlit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from vlit.errors import DataError, did_you_mean
from vlit.synth.engine.teacher import Message

FOLDER = Path(__file__).with_name("prompts")
SECTION = re.compile(r"^=== (system|user|assistant)[ \t]*$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A chat with placeholders. ``version`` changes with every byte of the file."""

    version: str
    sections: tuple[tuple[str, str], ...]

    def messages(self, images: Sequence[str] = (), **values: Any) -> tuple[Message, ...]:
        """The chat with its placeholders filled in; pictures go with the last message."""
        filled = []
        for number, (role, text) in enumerate(self.sections):
            last = number == len(self.sections) - 1
            said = Template(text).substitute(values) if last or role == "system" else text
            filled.append(Message(role, said, tuple(images) if last else ()))  # type: ignore[arg-type]
        return tuple(filled)


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


def read_prompt(name: str, *, own: str | None = None) -> Prompt:
    """The chat of ``recipe/name``; DataError when it has no sections or does not end with the user."""
    path = find(name, own=own)
    parts = SECTION.split(path.read_text(encoding="utf-8"))
    sections = tuple((parts[n], parts[n + 1].strip()) for n in range(1, len(parts), 2))
    if not sections or sections[-1][0] != "user":
        raise DataError(
            f"{path}: a prompt needs sections (=== system, === user, === assistant) and ends with === user."
        )
    return Prompt(version_of(path), sections)


def read_list(name: str, *, own: str | None = None) -> tuple[list[str], str]:
    """(entries, version) of a list: one a line; ``#`` begins a note; ``\\n`` in a line is a line break; ``""`` is an
    entry without words."""
    path = find(name, own=own)
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    entries = ["" if line == '""' else line.replace("\\n", "\n") for line in lines if line and not line.startswith("#")]
    if not entries:
        raise DataError(f"{path}: the list is empty. Write one entry a line.")
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
