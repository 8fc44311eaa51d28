"""Where completions come from: one protocol, and the engines that speak it (`[inference]`).

Token-in, token-out: an engine takes prompts as token ids and returns the ids it sampled, never text to tokenise again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from retrain.types import Completion, ConfigError

if TYPE_CHECKING:
    from retrain.backend import Backend
    from retrain.config import InferenceConfig


class Engine(Protocol):
    """Samples from the policy version that was last published to it."""

    policy_version: int

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        """G completions for each of P prompts (int64 token ids).

        streams_PG: int64 or uint64 [P, G], the random stream of each completion; equal streams, equal noise.
        temperature: > 0 samples and reports log-probs at that temperature; 0 is greedy, log-probs at temperature 1.
        """
        ...

    def publish(self, version: int) -> None:
        """From here on sample from the adapter as it is now, and call it `version`; nothing to do where it is that."""
        ...

    def close(self) -> None: ...


def open_engine(section: InferenceConfig, backend: Backend) -> Engine:
    """The engine of `[inference] engine`, serving the backend's policy as version 0."""
    from retrain.backend.local import LocalBackend
    from retrain.inference.pytorch import PyTorchEngine

    if section.engine != "pytorch" or not isinstance(backend, LocalBackend):
        raise ConfigError(f'inference.engine = "{section.engine}": not available yet; use "pytorch"')
    return PyTorchEngine(backend.policy, prefix_caching=section.prefix_caching)
