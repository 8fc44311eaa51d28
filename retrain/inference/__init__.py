"""Where completions come from: one protocol, and the engines that speak it (`[inference]`).

Token-in, token-out: an engine takes prompts as token ids and returns the ids it sampled, never text to tokenise again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from retrain.types import Completion, ConfigError
from retrain.types import ServerLost as ServerLost

if TYPE_CHECKING:
    from retrain.backend import Backend
    from retrain.config import Config, InferenceConfig


class Engine(Protocol):
    """Samples from the policy version that it was last told to use.

    policy_version: that one. overlaps: whether `generate` may run in another thread while the policy trains and further
    versions are staged; without it, nothing may change between `stage` and the end of the sampling.
    """

    policy_version: int
    overlaps: bool

    @property
    def servers_alive(self) -> int | None:
        """How many servers take part; None without any."""
        return None

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        """G completions for each of P prompts (int64 token ids), fewer where a server's text could not be used.

        streams_PG: int64 or uint64 [P, G], the random stream of each completion; equal streams, equal noise.
        temperature: > 0 samples and reports log-probs at that temperature; 0 is greedy, log-probs at temperature 1.
        """
        ...

    def stage(self, version: int) -> None:
        """Keep the adapter as it is now under the name `version`; sampling goes on with the one that is in use.

        Versions name adapters: staging one that is staged or in use already changes nothing.
        """
        ...

    def use(self, version: int) -> None:
        """From here on sample from `version`, which was staged, and forget the ones before it."""
        ...

    def publish(self, version: int) -> None:
        """From here on sample from the adapter as it is now, and call it `version`."""
        self.stage(version)
        self.use(version)

    def close(self) -> None: ...


@dataclass(frozen=True)
class Serving:
    """What a server engine has to know beyond `[inference]` and the policy.

    model: as the config names it. adapter_path: folder that this process writes and the servers read. temperature,
    max_tokens: of the run's completions. say: takes a line about what goes on, from another thread.
    """

    model: str
    adapter_path: str
    temperature: float
    max_tokens: int
    say: Callable[[str], None]

    @classmethod
    def of(cls, config: Config, say: Callable[[str], None]) -> Serving:
        training = config.training
        return cls(config.model.model, config.backend.adapter_path, training.temperature, training.max_tokens, say)


def open_engine(section: InferenceConfig, backend: Backend, serving: Serving | None = None) -> Engine:
    """The engine of `[inference] engine`. In this process, it serves the backend's policy as version 0 from the start;
    a server serves the base model until something is published to it.

    serving: needed by the engines other than "pytorch". Raises ConfigError where the servers do not fit the config.
    """
    from retrain.backend.tinker import TinkerBackend

    if isinstance(backend, TinkerBackend):
        from retrain.inference.tinker import TinkerEngine

        return TinkerEngine(backend)
    if section.engine == "pytorch":
        from retrain.backend.local import LocalBackend
        from retrain.inference.pytorch import PyTorchEngine

        if not isinstance(backend, LocalBackend):
            raise ConfigError('inference.engine = "pytorch": samples from a policy in this process, and there is none')
        if backend.config.backend.is_split:
            from retrain.inference.split import SplitEngine

            engine = SplitEngine(backend, serving.say if serving else lambda line: None)
        else:
            engine = PyTorchEngine.of(backend.policy, section)
        if serving is not None:
            serving.say(f"sampling: {engine.path}")
        return engine
    from retrain.inference.server import ServerEngine

    if serving is None:
        raise ConfigError(f'inference.engine = "{section.engine}": not available yet; use "pytorch"')
    return ServerEngine(section, backend, serving)
