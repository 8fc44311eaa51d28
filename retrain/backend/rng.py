"""The process's global random generators. Sampling does not use them; dropout and plug-ins may."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)


def capture() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, in types that torch.load reads with weights_only."""
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [str(name), [int(word) for word in words], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, numpy_words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(numpy_words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([cuda.cpu() for cuda in state["cuda"]])
