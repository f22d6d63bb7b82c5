"""The checks of ``vlit doctor``: an ``error`` goes into the manifest and training leaves the record out, a ``note`` is
counted and shown.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "note"]


class Finding(NamedTuple):
    """What one check has to say about a record or an image."""

    check: str
    reason: str
    """A sentence with the values, without the name of the dataset file and the number of the record."""


class Check(NamedTuple):
    """One kind of finding."""

    severity: Severity
    title: str
    fix: str


CHECKS: dict[str, Check] = {
    "json": Check("error", "not valid JSON", "Write the record anew. NaN and Infinity are no JSON: use null or a string."),
    "fields": Check("error", "a field missing or of the wrong type", "Make the field that is named what its format asks for."),
    "turns": Check(
        "error",
        "conversations missing, empty or out of order",
        "Turns alternate human, gpt, human first, gpt last, none of them empty; a system turn may come first.",
    ),
    "image_path": Check(
        "error",
        "image reference that is no path inside the folder",
        "Write paths relative to the image folder, without .., and download what stands on the network.",
    ),
    "placeholders": Check(
        "error",
        "placeholders and images differ",
        "Write one <image> in a human turn for each image, and list one image for each <image>.",
    ),
    "point_cloud": Check(
        "error", "a point cloud instead of a picture", "Leave them out: no encoder here sees point clouds."
    ),
    "video": Check("error", "a video instead of a picture", "Take frames out of it as pictures, or leave the record out."),
    "record": Check("error", "refused by the format", "Make the record what the format describes."),
    "image_missing": Check(
        "error", "image missing", "Download the image, correct its extension in the record, or correct images: of the source."
    ),
    "image_outside": Check(
        "error",
        "image outside the image folder",
        "Move the image into the folder, or set data.follow_links: true if you made the links that lead out of it.",
    ),
    "image_no_file": Check("error", "not a file", "Name an image file; this is a folder, a device or a pipe."),
    "image_unreadable": Check("error", "image may not be read", "Change the permissions of the file or its folder."),
    "image_empty": Check("error", "image of zero bytes", "Download the file again; the last download or copy failed."),
    "image_not_image": Check(
        "error", "not an image", "Download the file again: a dead link often leaves a web page under the image's name."
    ),
    "image_damaged": Check("error", "image cut off or damaged", "Copy or download the file again."),
    "image_too_large": Check(
        "error", "image too large to decode", "Make the picture smaller. Nothing of it was decoded: its header says the size."
    ),
    "crash": Check(
        "error",
        "ends the process that looks at it",
        "Replace the image, or shorten the text; for an image, updating Pillow may help. It would end training too.",
    ),
    "template": Check(
        "error", "the chat template cannot hold it", "Use a template for such conversations (template: of the stage)."
    ),
    "no_supervision": Check(
        "error", "nothing to learn within max_tokens", "Shorten the question, or raise data.max_tokens."
    ),
    "duplicate": Check("error", "same id and same content as an earlier record", "Remove it; the first one is kept."),
    "same_id": Check(
        "note",
        "same id as an earlier record, other content",
        "Nothing to do: ids only name records in messages. Published datasets repeat them.",
    ),
    "drops_turns": Check("note", "longer than max_tokens, loses turns", "Raise data.max_tokens, or split the record."),
    "cuts_answer": Check(
        "note", "longer than max_tokens, its answer is cut", "Raise data.max_tokens, or shorten the record."
    ),
    "crash_once": Check(
        "note",
        "a process died over it, a second look succeeded",
        "Mostly memory was short. Use fewer workers (--workers), and look at the size of the image.",
    ),
    "image_extension": Check("note", "extension of another format", "Nothing to do: the content decides how it is decoded."),
    "image_unfinished": Check("note", "file ends early, all pixels are there", "Nothing to do, unless copies are at fault."),
    "image_cmyk": Check("note", "CMYK", "Nothing to do: converted to RGB without a colour profile. Look at one example."),
    "image_palette": Check("note", "palette", "Nothing to do: converted to RGB."),
    "image_deep": Check("note", "16-bit or float grey", "Nothing to do: scaled to 8 bits. Look at one example."),
    "image_transparent": Check("note", "transparency", "Nothing to do: laid over the encoder's mean colour."),
    "image_animated": Check("note", "several frames", "Only the first frame is used."),
    "image_rotated": Check("note", "stored rotated (EXIF)", "Nothing to do: shown upright to the model."),
    "image_tiny": Check("note", "a single pixel", "Look whether it stands for a missing picture."),
    "image_strip": Check("note", "sides of 32 : 1 and more", "Padding leaves little of it; consider cutting it up."),
}  # fmt: skip


def severity_of(check: str) -> Severity:
    """``error`` or ``note``; a check that a format of another package names itself is an error."""
    return CHECKS[check].severity if check in CHECKS else "error"


def title_of(check: str) -> str:
    """The words a reader sees for a check."""
    return CHECKS[check].title if check in CHECKS else check.replace("_", " ")
