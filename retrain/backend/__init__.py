"""What trains: one protocol, and the backends that speak it (`[backend]`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retrain.distributed import ALONE, World
from retrain.types import Batch, StepResult

if TYPE_CHECKING:
    from retrain.config import Config


class Backend(Protocol):
    """A policy that samples are drawn from and that learns from them.

    tokenizer: of the model. context: longest sequence, in tokens. eos_ids: token ids that end a completion.
    vocab_size: token ids lie below it. uncertainty: the kind that weighs token credit.
    """

    tokenizer: Any
    context: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    uncertainty: str

    def step(self, batch: Batch, step: int) -> StepResult:
        """One training step on `batch`; `step` counts from 0."""
        ...

    def logprobs(
        self,
        prompt_tokens: np.ndarray,
        completion_tokens: np.ndarray,
        *,
        temperature: float = 1.0,
        adapter: bool = True,
    ) -> np.ndarray:
        """Log-prob of each completion token under the policy as it is now, in nats, float32 [T].

        prompt_tokens: int64 [S], S >= 1. completion_tokens: int64 [T], T >= 1. What an engine that serves this policy
        must report of them. adapter: False for those under the base model.
        """
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write a plain PEFT adapter."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Take up the adapter that `save_adapter` wrote."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything a resumed run needs: adapter, optimizer, random streams."""
        ...

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the run's metadata says of the model: parameter counts, device, dtype, digest of the base."""
        ...

    def base_digest(self) -> str | None:
        """SHA-256 over the base's tensors; None where they are not in this process."""
        ...

    def figures(self) -> dict[str, float | None]:
        """What a service took since the last call, as `retrain.training.metrics.SERVICE` names it; {} without one."""
        ...

    def peak_memory_bytes(self) -> int: ...


def open_backend(config: Config, *, seed: int, say: Callable[[str], None], world: World = ALONE) -> Backend:
    """The backend of `[backend] backend`, with the model loaded and a fresh adapter drawn from `seed`.

    world: the ranks that train together.
    """
    if config.backend.backend == "tinker":
        from retrain.backend.tinker import TinkerBackend

        return TinkerBackend(config, seed=seed, say=say)
    from retrain.backend.local import LocalBackend

    return LocalBackend(config, seed=seed, say=say, world=world)
