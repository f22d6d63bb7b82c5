"""Random orders that are pure functions of a key: the same on every machine, numpy version, rank and worker.

Each index gets the 64-bit value ``splitmix64(key + index)`` (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195) and
the order sorts those values; numpy's own generators may change their streams between versions, this arithmetic cannot.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stream_key(*parts: int | str) -> int:
    """64-bit key of a named random stream, for example ``stream_key(seed, "epoch", 3)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_uint64(count: int, key: int) -> np.ndarray:
    """uint64 [count], independent uniform values."""
    with np.errstate(over="ignore"):
        state = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        return state ^ (state >> np.uint64(31))


def permutation(count: int, key: int) -> np.ndarray:
    """int64 [count]: 0 … count-1 in random order."""
    return np.argsort(random_uint64(count, key), kind="stable")
