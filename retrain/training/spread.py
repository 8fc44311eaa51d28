"""Sampling and judging, spread over the ranks of a run: each takes its share of the groups, and all get all of them.

So whatever looks at a step's groups sees the same on every rank, and knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrain.distributed import World
from retrain.environment import Outcome
from retrain.inference import Engine
from retrain.training.rollouts import Rollouts
from retrain.training.stopwatch import Stopwatch
from retrain.types import Completion, Example


@dataclass(frozen=True)
class _OfRanks:
    """own: what samples and judges in this process."""

    own: Rollouts
    world: World

    @property
    def examples(self) -> Sequence[Example]:
        return self.own.examples

    @property
    def prompt_tokens(self) -> Sequence[np.ndarray]:
        return self.own.prompt_tokens


@dataclass(frozen=True)
class Spread(_OfRanks):
    """See `retrain.training.rollouts.Rollouts`.

    together: whether `own` samples in lockstep with the other ranks', so that it is called where it has nothing to do.
    """

    together: bool = False

    def groups(
        self, places: Sequence[int], streams_PG: np.ndarray, *, temperature: float, watch: Stopwatch
    ) -> list[list[Outcome]]:
        rank, size = self.world.rank, self.world.size
        mine = places[rank::size]

        def share() -> tuple[list[list[Outcome]], dict[str, float]]:
            if not mine and not self.together:
                return [], {}
            own = Stopwatch()
            return self.own.groups(mine, streams_PG[rank::size], temperature=temperature, watch=own), own.stages

        shares = self.world.each(share)
        # A stage takes as long as it takes the slowest.
        names = {stage for _, stages in shares for stage in stages}
        watch.add({stage: max(stages.get(stage, 0.0) for _, stages in shares) for stage in names})
        return [shares[place % size][0][place // size] for place in range(len(places))]

    def figures(self) -> dict[str, float | None]:
        return combined(self.world.gather(self.own.figures()))


@dataclass(frozen=True)
class FirstAlone(_OfRanks):
    """See `retrain.training.rollouts.Rollouts`. Rank 0 alone talks to servers and judges; the others get what came."""

    def groups(
        self, places: Sequence[int], streams_PG: np.ndarray, *, temperature: float, watch: Stopwatch
    ) -> list[list[Outcome]]:
        return self.world.first(lambda: self.own.groups(places, streams_PG, temperature=temperature, watch=watch))

    def figures(self) -> dict[str, float | None]:
        return self.world.first(self.own.figures)


class EngineOfFirst(Engine):
    """See `retrain.inference.Engine`: the engine that rank 0 has, seen from every rank. Only rank 0 samples from it."""

    def __init__(self, on_first: Callable[[Callable[[], Any]], Any], open_own: Callable[[], Engine]) -> None:
        """on_first: as `World.first`. Raises what `open_own` raises on rank 0."""
        self.on_first, self.policy_version = on_first, 0
        self.own: Engine | None = None

        def open_first() -> bool:
            self.own = open_own()
            return self.own.overlaps

        self.overlaps = on_first(open_first)

    @property
    def servers_alive(self) -> int | None:
        return self.own.servers_alive if self.own is not None else None

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        assert self.own is not None
        return self.own.generate(prompts, streams_PG, max_tokens=max_tokens, temperature=temperature)

    def stage(self, version: int) -> None:
        own = self.own
        self.on_first(lambda: own and own.stage(version))

    def use(self, version: int) -> None:
        if self.own is not None:
            self.own.use(version)
        self.policy_version = version

    def close(self) -> None:
        if self.own is not None:
            self.own.close()


def combined(figures: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The figures of all ranks' scorers as those of one: sums; of a latency, the mean weighted by its requests."""
    merged: dict[str, float | None] = {}
    for name in figures[0]:
        values = [own[name] for own in figures]
        if "latency_s" in name:
            requests = [own[name.replace("latency_s", "requests")] or 0 for own in figures]
            merged[name] = _mean(values, requests)
        else:
            merged[name] = sum(value or 0 for value in values)
    return merged


def _mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
