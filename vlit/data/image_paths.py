"""Image references of records -> files of the image folder; everything that could reach another file is refused.

A reference may lead into a container in the folder (``shard.tar#1.jpg``, :mod:`vlit.data.members`); both parts obey the rules.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path, PurePosixPath

from vlit.data.members import member_file, split_member
from vlit.errors import DataError

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|(data|file|https?|ftp):", re.IGNORECASE)
_WINDOWS_ABSOLUTE = re.compile(r"[a-z]:[\\/]|\\\\", re.IGNORECASE)
_MAX_NAME, _MAX_PATH = 255, 2048  # bytes; what file systems take


def refusal(image: str) -> str | None:
    """Why an image reference cannot name a file of an image folder, whatever the folder; None when it can."""
    if not image.strip():
        return f"image path is {image!r}, expected a non-empty string"
    if member := split_member(image):
        return refusal(member.container) or _refusal_of_member(member.name)
    if "\0" in image or _REMOTE.match(image):
        return f"image path {image[:80]!r} is not a file path (remote and inline images are not read)"
    if _WINDOWS_ABSOLUTE.match(image):
        return f"image path {image[:80]!r} is absolute; write it relative to the image folder, with /"
    if ".." in PurePosixPath(image.replace("\\", "/")).parts:
        return f"image path {image[:80]!r} leaves the image folder with .."
    encoded = os.fsencode(image)
    if len(encoded) > _MAX_PATH or max(map(len, encoded.split(b"/"))) > _MAX_NAME:
        return f"image path {image[:80]!r}… has {len(encoded)} bytes, more than a file name can have"
    return None


def _refusal_of_member(name: str) -> str | None:
    if "\0" in name or name.startswith("/") or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        return f"image {name[:80]!r} of a container has no safe name (absolute, or with ..)"
    return None


def resolve_image(image: str, image_root: Path, *, follow_links: bool = False, cache_dir: str | None = None) -> Path:
    """The file an image reference names. References are data, so ``..`` and absolute paths outside the root are refused.

    So are links in the folder that lead out of it, unless ``follow_links`` says that they may; the folder itself may be a
    link. Costs one system call an image, and a few for each folder when it is first met. An image in a container is copied
    into the cache (``cache_dir``) when it is first asked for.
    """
    if (member := split_member(image)) and refusal(image) is None:
        container = resolve_image(member.container, image_root, follow_links=follow_links)
        return member_file(container, member.name, cache_dir=cache_dir)
    path = Path(image)
    if reason := refusal(image):
        raise DataError(f"{reason} (image folder {image_root}). Write a path relative to that folder, without ..")
    if path.is_absolute():
        if not path.is_relative_to(image_root.absolute()):
            raise DataError(
                f"image {image!r} lies outside the image folder {image_root}. Set images: of the data source to a "
                "folder that holds it, or make the path relative."
            )
    else:
        path = image_root / path
    if not follow_links:
        _refuse_way_out(str(path), image, str(image_root))
    return path


def _refuse_way_out(path: str, image: str, image_root: str) -> None:
    """DataError when a link leads out of the image folder."""
    folder, name = os.path.split(path)
    if not (
        os.path.isabs(folder) and os.path.isabs(image_root)
    ):  # what is remembered must hold in any working directory
        folder, image_root = os.path.abspath(folder), os.path.abspath(image_root)
    if not os.path.islink(path):
        if _is_inside(folder, image_root):
            return
        real = os.path.join(os.path.realpath(folder), name)
    else:
        real = os.path.realpath(path)
        if _is_inside(os.path.dirname(real), image_root):
            return
    raise DataError(
        f"image {image!r} is a link that leads out of the image folder {image_root}, to {real}. Move the file into the "
        "folder, or set data.follow_links: true if you trust who made the link."
    )


@functools.lru_cache(maxsize=1 << 16)
def _is_inside(folder: str, root: str) -> bool:
    """Whether ``folder`` really lies in ``root``, or is it."""
    real = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(folder), real]) == real
