"""A run of several ranks: what each of them has of its own, and what has to be the same on all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retrain.backend import Backend
from retrain.backend.devices import device_of_rank
from retrain.distributed import World
from retrain.training.start import resolved_toml
from retrain.types import Example, RetrainError

if TYPE_CHECKING:
    from retrain.config import Config


class Quiet:
    """See `retrain.training.loop.Observer`. Of the ranks other than the first, which speaks for all."""

    def say(self, line: str) -> None:
        pass

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        pass


def placed(config: Config, world: World) -> Config:
    """The config with the device of this rank. Raises ConfigError where its machine has no such."""
    devices = device_of_rank(config.backend.devices, world)
    return config.model_copy(update={"backend": config.backend.model_copy(update={"devices": devices})})


def check_same_run(config: Config, examples: Sequence[Example], base_sha256: str | None, world: World) -> None:
    """Raise RetrainError, on all ranks, where they have read different things: each reads files of its own machine."""
    digest = hashlib.sha256("".join(example.id for example in examples).encode()).hexdigest()
    read = {
        "the config": resolved_toml(config),
        "the examples of [data]": digest,
        "the weights of the base": base_sha256,
    }
    try:
        for what, value in read.items():
            world.same(what, value)
    except RetrainError as error:
        raise type(error)(f"{error}: every machine needs the same files") from error


def check_replicas(backend: Backend, world: World) -> None:
    """Raise RetrainError, on all ranks, where their adapters or optimizers have come apart: what they train together
    would be nobody's gradient."""
    if world.size == 1:
        return
    from retrain.backend.local import LocalBackend

    assert isinstance(backend, LocalBackend)  # `check_ranks` sees to it
    try:
        world.same("the adapters have come apart", backend.replica_digest())
    except RetrainError as error:
        raise type(error)(
            f"{error}. Nothing of this step is kept. The machines compute different things: use the same GPUs and the "
            "same versions on all of them"
        ) from error
