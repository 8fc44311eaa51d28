"""The process's global random generators. Sampling does not use them; dropout and plug-ins may."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)


def capture() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State of Python's and NumPy's generators, in JSON's types, and of torch's, uint8 by name."""
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numbers = {
        "python": random.getstate(),
        "numpy": [str(name), [int(word) for word in words], int(position), int(has_gauss), float(gauss)],
    }
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return numbers, {"rng/cpu": torch.get_rng_state(), **{f"rng/cuda:{i}": state for i, state in enumerate(cuda)}}


def restore(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    name, numpy_words, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, np.array(numpy_words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng/cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng/cuda:{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda:{i}"], i)
