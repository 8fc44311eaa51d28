"""What the ranks of a test do together, and the process that is the second rank: `python tests/rank_tasks.py`.

The test is the first rank; it names a task and its arguments, and every rank calls it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiny_models as models
from retrain.backend.learner import Learner
from retrain.backend.local import LocalBackend
from retrain.backend.recovery import OutOfMemory
from retrain.config import Config
from retrain.distributed import World, open_world
from retrain.inference.pytorch import PyTorchEngine
from retrain.plugin import child_environment
from retrain.types import Batch, Completion, StepResult


@contextmanager
def second_rank() -> Iterator[World]:
    """The world of this process and one more, which calls what `call` asks for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    before = dict(os.environ)
    other = subprocess.Popen(
        [sys.executable, __file__], env=child_environment() | shared | {"RANK": "1", "LOCAL_RANK": "1"}
    )
    os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
    try:
        with open_world() as world:
            os.environ.clear()
            os.environ.update(before)
            yield world
            agreed(world, None)
        assert other.wait(60) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
        other.kill()


def call(world: World, task: str, *arguments: Any) -> Any:
    """What `task(world, *arguments)` gives here, while the other rank calls it as well."""
    agreed(world, (task, arguments))
    return globals()[task](world, *arguments)


def agreed(world: World, asked: Any) -> Any:
    return world.first(lambda: asked)


def serve() -> None:
    with open_world() as world:
        while asked := agreed(world, None):
            with suppress(Exception):  # the first rank looks at it
                globals()[asked[0]](world, *asked[1])


# ---- tasks --------------------------------------------------------------------------------------------------------


@cache
def backend_on(folder: str, precise: bool) -> LocalBackend:
    torch.set_num_threads(1)
    backend = LocalBackend(models.config_for(folder), seed=0, say=lambda line: None)
    models.stir(backend.policy.peft)
    if precise:
        models.in_float64(backend.policy.peft)
    return backend


@cache
def stirred(folder: str, precise: bool) -> list[torch.Tensor]:
    return [p.detach().clone() for p in backend_on(folder, precise).policy.adapter_parameters()]


def step(
    world: World,
    folder: str,
    precise: bool,
    config: Config,
    batch: Batch,
    steps: int = 1,
    trouble: tuple[str, int] | None = None,
    sharded: bool = False,
) -> tuple[StepResult, list[torch.Tensor | None], list[torch.Tensor]]:
    """Steps of a learner whose adapter begins as always: the last result, gradients, parameters.

    trouble: a kind of it, and the rank that is to have it.
    """
    policy = sharded_backend(world, folder).policy if sharded else backend_on(folder, precise).policy
    with torch.no_grad():
        for parameter, value in zip(policy.adapter_parameters(), stirred(folder, precise), strict=True):
            parameter.copy_(value)
    learner = Learner(policy, config, world)
    if trouble and trouble[1] == world.rank:
        cause(trouble[0], learner)
    for number in range(steps):
        result = learner.step(batch, number)
    gradients = [None if p.grad is None else p.grad.clone() for p in learner.parameters]
    return result, gradients, [p.detach().clone() for p in learner.parameters]


def cause(kind: str, learner: Learner) -> None:
    """Once, at the first micro-batch of this rank."""
    usual, times = learner._logprob, iter([1])

    def spoilt(micro):
        if next(times, None) is None:
            return usual(micro)
        if kind == "memory":
            raise OutOfMemory(micro.tokens_RS.numel(), 2)
        logprob_N, entropy_N = usual(micro)
        return logprob_N * float("nan"), entropy_N

    learner._logprob = spoilt  # type: ignore[method-assign]


@cache
def sharded_backend(world: World, folder: str) -> LocalBackend:
    config = models.config_for(folder, backend__sharding="fsdp")
    backend = LocalBackend(config, seed=0, say=lambda line: None, world=world)
    models.stir(backend.policy.peft)
    return backend


def sharded_digest(world: World, folder: str) -> str:
    return sharded_backend(world, folder).base_digest()


def sharded_logprobs(world: World, folder: str, texts: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Asked for on the first rank alone."""
    backend = sharded_backend(world, folder)

    def work() -> list[np.ndarray]:
        return [backend.logprobs(*text, temperature=0.7, adapter=i % 2 == 0) for i, text in enumerate(texts)]

    return backend.on_first(work)


def sharded_samples(world: World, folder: str, prompts: list[np.ndarray], rank: int) -> list[tuple[Completion, ...]]:
    """Of `rank`; the other one has nothing to sample."""
    engine = PyTorchEngine(sharded_backend(world, folder).policy)
    mine = prompts if world.rank == rank else []
    return world.gather(sampled(engine, mine))[rank]


def sampled(engine: PyTorchEngine, prompts: list[np.ndarray]) -> list[tuple[Completion, ...]]:
    streams = np.arange(3 * len(prompts), dtype=np.uint64).reshape(-1, 3)
    return engine.generate(prompts, streams, max_tokens=9, temperature=1.0)


def digests(world: World, folder: str) -> list[str]:
    return world.gather(backend_on(folder, False).replica_digest())


def fail_on(world: World, rank: int, kind: type[Exception], *words: object) -> Any:
    def work() -> int:
        if world.rank == rank:
            raise kind(*words)
        return world.rank

    return world.each(work)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve()
