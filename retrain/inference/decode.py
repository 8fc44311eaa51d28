"""What a decoder is: it runs the model over prompts once, then over one token of every row at a time.

Two of them: `retrain.inference.fused` for the architectures it knows, `retrain.inference.modules` for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Rows(Protocol):
    """Completions under way, in the order of their prompts."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token (int64) of every row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with the rows of these positions, int64 and ascending, alone."""
        ...


class Decoder(Protocol):
    """The model of one policy version. path: how it decodes and why, in one line."""

    path: str

    def refresh(self) -> None:
        """Take up the adapter as it is now."""
        ...

    def start(self, prompts: Sequence[np.ndarray], size: int, limit: int) -> tuple[Tensor, Rows]:
        """Logits [P * size, V] after each prompt, and `size` rows of each that can take up to `limit` tokens."""
        ...


def padded(prompts: Sequence[np.ndarray], pad_id: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Prompts as int64 [P, S] and their lengths, int64 [P]."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.full((len(prompts), lengths.max()), pad_id, dtype=np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) if left else 0 :][: len(prompt)] = prompt
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)
