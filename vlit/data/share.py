"""Records of one image as a tree: their common leading tokens once, every conversation after them.

Records that show the same picture in the same way begin with the same tokens: template header, image, often more. In a
packed row these tokens stand once, as the *prefix* of a tree; each record follows with the tokens of its own and attends to
the prefix and to itself. Loss and gradients are those of separate records, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlit.types import TokenizedSample


@dataclass(frozen=True, slots=True)
class Tree:
    """Samples whose first ``prefix`` tokens are the same; a sample of its own has prefix 0."""

    members: tuple[int, ...]
    """Numbers of the samples in whatever list the tree was made from."""
    lengths: tuple[int, ...]
    """Tokens of each member, its prefix included."""
    own_images: tuple[int, ...]
    """Images of each member after the prefix."""
    prefix: int = 0
    prefix_images: int = 0

    @property
    def num_tokens(self) -> int:
        """Positions the tree takes in a row."""
        return sum(self.lengths) - self.prefix * (len(self.members) - 1)

    @property
    def images(self) -> int:
        """Images of the tree, those of the prefix counted once."""
        return self.prefix_images + sum(self.own_images)

    def without(self, member: int) -> Tree:
        """The tree without one of its members."""
        keep = [place for place, number in enumerate(self.members) if number != member]
        members, lengths, own = (
            tuple(values[place] for place in keep) for values in (self.members, self.lengths, self.own_images)
        )
        return replace(self, members=members, lengths=lengths, own_images=own)


def single(number: int, sample: TokenizedSample) -> Tree:
    """A sample of its own."""
    return Tree((number,), (len(sample),), (len(sample.images),))


def share_prefixes(samples: Sequence[TokenizedSample], files: Sequence[Sequence[str]], max_tokens: int) -> list[Tree]:
    """Group samples that begin with the same tokens up to and including their first image.

    Args:
        files: for each sample the files of its images; two samples share an image when the file is the same.
        max_tokens: a tree that would be longer becomes several, each with the prefix.

    Returns:
        Trees in the order of their first sample; every sample is in exactly one.
    """
    groups: dict[object, list[int]] = {}
    images: dict[str, int] = {}
    marked: list[np.ndarray] = []
    for number, (sample, names) in enumerate(zip(samples, files, strict=True)):
        ids = _with_images(sample, [images.setdefault(name, len(images)) for name in names])
        marked.append(ids)
        end = _first_image_end(sample)
        groups.setdefault(ids[:end].tobytes() if end else number, []).append(number)
    trees: list[Tree] = []
    for members in groups.values():
        if len(members) == 1:
            trees.append(single(members[0], samples[members[0]]))
            continue
        prefix = _common_prefix([marked[n] for n in members], samples[members[0]].is_image)
        for part in _parts(members, samples, prefix, max_tokens):
            trees.append(_tree(part, samples, prefix))
    return sorted(trees, key=lambda tree: tree.members[0])


def _with_images(sample: TokenizedSample, numbers: Sequence[int]) -> np.ndarray:
    """Token ids with every image position replaced by -1 - the number of its image file."""
    ids = sample.input_ids.copy()
    if numbers:
        span = int(sample.is_image.sum()) // len(numbers)
        ids[sample.is_image] = np.repeat(-1 - np.asarray(numbers, np.int64), span)
    return ids


def _first_image_end(sample: TokenizedSample) -> int:
    """One past the last position of the first image; 0 without an image."""
    if not sample.images:
        return 0
    return int(np.flatnonzero(sample.is_image)[int(sample.is_image.sum()) // len(sample.images) - 1]) + 1


def _common_prefix(rows: Iterable[np.ndarray], is_image: np.ndarray) -> int:
    """Longest common prefix that leaves every row a token of its own and ends in no image."""
    first, *others = rows
    prefix = len(first) - 1
    for row in others:
        prefix = min(prefix, len(row) - 1)
        differs = np.flatnonzero(first[:prefix] != row[:prefix])
        prefix = int(differs[0]) if len(differs) else prefix
    while prefix < len(first) and is_image[prefix] and prefix and first[prefix] == first[prefix - 1]:
        prefix -= 1
    return prefix


def _parts(members: list[int], samples: Sequence[TokenizedSample], prefix: int, max_tokens: int) -> list[list[int]]:
    """Cut a group so that each part fits into ``max_tokens`` (one sample always makes a part)."""
    parts: list[list[int]] = []
    room = 0
    for number in members:
        own = len(samples[number]) - prefix
        if not parts or own > room:
            parts.append([])
            room = max_tokens - prefix
        parts[-1].append(number)
        room -= own
    return parts


def _tree(members: list[int], samples: Sequence[TokenizedSample], prefix: int) -> Tree:
    if len(members) == 1:
        return single(members[0], samples[members[0]])
    first = samples[members[0]]
    shared = int(first.is_image[:prefix].sum()) * len(first.images) // int(first.is_image.sum())
    own = tuple(len(samples[n].images) - shared for n in members)
    return Tree(tuple(members), tuple(len(samples[n]) for n in members), own, prefix, shared)
