"""What a training step survives: a number that is not finite, and memory that does not suffice."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retrain.backend import rng
from retrain.backend.devices import is_out_of_memory


class NotFinite(Exception):
    """what: "loss", "gradient", "log-probabilities" or "sampler's log-probabilities". culprits: positions of the
    rollouts where it showed."""

    def __init__(self, what: str, culprits: Sequence[int]) -> None:
        super().__init__(f"the {what} of rollouts {list(culprits)} are not finite")
        self.what, self.culprits = what, tuple(sorted(culprits))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.culprits)


class OutOfMemory(Exception):
    """tokens, sequences: those that were together on the device when memory ran out."""

    def __init__(self, tokens: int, sequences: int) -> None:
        super().__init__(
            f"{sequences} sequences of {tokens} tokens together do not fit into memory: lower "
            "training.micro_batch_tokens"
        )
        self.tokens, self.sequences = tokens, sequences

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokens, self.sequences)


@contextmanager
def fitting(*, tokens: int, sequences: int) -> Iterator[None]:
    """Inside, an allocation that fails raises OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(tokens, sequences) from error


@contextmanager
def all_or_nothing(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, *, updates: int) -> Iterator[None]:
    """Inside, an error leaves weights, optimizer and random generators as they were, and no gradient.

    updates: optimizer updates within. With one alone nothing is copied: an error that can be recovered from comes
    before it.
    """
    random = rng.capture()
    weights = [parameter.detach().clone() for parameter in parameters] if updates > 1 else None
    state = copy.deepcopy(optimizer.state_dict()) if updates > 1 else None
    try:
        yield
    except BaseException:
        if weights is not None and state is not None:
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
            optimizer.load_state_dict(state)
        optimizer.zero_grad(set_to_none=True)
        rng.restore(*random)
        raise


def release_memory() -> None:
    """Return to the device what a failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
