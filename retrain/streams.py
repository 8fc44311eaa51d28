"""Random streams keyed by what they are for, never by the order of calls.

Two runs that agree on the key draw the same numbers, however the work is batched, resumed or spread: this is what
makes a resumed run, a paired seed and a regrouped batch comparable bit for bit.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_key(seed: int, *path: int | str) -> int:
    """64-bit key of the stream `path` under `seed`, e.g. stream_key(7, "sample", step, prompt, completion).

    In 0..2^64-1: BLAKE2b (RFC 7693) of the parts, so that streams of different purposes never meet.
    """
    text = "\0".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(key: int) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) for one stream. key: 0..2^64-1."""
    return np.random.Generator(np.random.Philox(key=key))


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """keys: uint64 [B], B >= 1. Returns float32 [B, count] in [0, 1): row b depends on keys[b] alone."""
    return np.stack([generator(int(key)).random(count, dtype=np.float32) for key in keys])
