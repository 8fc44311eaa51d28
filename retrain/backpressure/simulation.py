"""Simulated machines, on which the controller and simpler ways to choose a batch size can be compared."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from retrain.backpressure.controller import State, decide, observe
from retrain.backpressure.usl import Usl
from retrain.config import BackpressureConfig
from retrain.streams import generator, stream_key

Policy = Generator[int, float, None]
"""Yields a step's batch size, and is sent the throughput that the step then had."""

OpenPolicy = Callable[[BackpressureConfig, int, int], Policy]
"""(section, group size, `training.batch_size`) to a policy."""

# What AIMD takes for congestion: a step this much slower than the one before.
SLOWER = 0.1


@dataclass(frozen=True)
class Machine:
    """Throughput over concurrency, as a run would see it.

    laws: (first step, law), the first at step 0: the law may change during the run. noise: standard deviation of the
    log of a step's throughput about it. drift: that of the scale's random walk, a step. group_size: completions of a
    prompt, so that the concurrency of a step is its batch size times this.
    """

    laws: tuple[tuple[int, Usl], ...]
    noise: float = 0.05
    drift: float = 0.0
    group_size: int = 16

    def law(self, step: int) -> Usl:
        return [law for first, law in self.laws if first <= step][-1]


@dataclass(frozen=True)
class Trace:
    """S simulated steps. sizes_S: int64 batch sizes. shares_S: float64 in (0, 1], the throughput without noise as a
    share of the best that any allowed batch size has at that step."""

    sizes_S: np.ndarray
    shares_S: np.ndarray

    @property
    def regret(self) -> float:
        """Share of the throughput that was lost to always having the best batch size."""
        return float(1 - self.shares_S.mean())

    def settled(self, within: float = 0.1) -> int:
        """Steps before the throughput stays within this share of the best; all of them where it never does."""
        far = np.flatnonzero(self.shares_S < 1 - within)
        return int(far[-1]) + 1 if len(far) else 0

    def swing(self, first: int) -> int:
        """Largest move back, in prompts, from step `first` on: how far the size rises after a fall, or falls after a
        rise, the smaller of the two. 0: it moved in one direction only."""
        return max(
            (min(abs(b - a), abs(c - b)) for a, b, c in _turns([int(size) for size in self.sizes_S[first:]])),
            default=0,
        )


def simulate(
    policy: OpenPolicy,
    machine: Machine,
    *,
    steps: int = 200,
    seed: int = 0,
    section: BackpressureConfig | None = None,
    batch_size: int = 8,
) -> Trace:
    """Let a policy choose the batch sizes of a run on a machine. The same seed has the same noise for every policy.

    policy: one of `POLICIES`, or another. section: the bounds and the controller's keys, None for their defaults.
    batch_size: `training.batch_size`.
    """
    section = section or BackpressureConfig()
    rng = generator(stream_key(seed, "backpressure"))
    noise_S, scale_S = np.exp(machine.noise * rng.standard_normal(steps)), np.ones(steps)
    scale_S[1:] = np.exp(machine.drift * rng.standard_normal(steps - 1).cumsum())
    allowed = range(section.min_batch_size, section.max_batch_size + 1)
    running = policy(section, machine.group_size, batch_size)
    sizes, shares = [next(running)], []
    for step in range(steps):
        speeds = {size: machine.law(step).throughput(size * machine.group_size) for size in (*allowed, sizes[-1])}
        shares.append(speeds[sizes[-1]] / max(speeds[size] for size in allowed))
        sizes.append(running.send(speeds[sizes[-1]] * scale_S[step] * noise_S[step]))
    return Trace(np.array(sizes[:-1]), np.array(shares))


def adaptive(section: BackpressureConfig, group_size: int, batch_size: int) -> Policy:
    """What `[backpressure]` does."""
    state = State(batch_size)
    while True:
        decision = decide(state, section, group_size)
        state = observe(state, decision, (yield decision.batch_size))


def fixed(section: BackpressureConfig, group_size: int, batch_size: int) -> Policy:
    """`training.batch_size`, always."""
    while True:
        yield batch_size


def doubling(section: BackpressureConfig, group_size: int, batch_size: int) -> Policy:
    """Double from the smallest size until a step is slower than the one before, then stay at the faster."""
    size = section.min_batch_size
    speed = yield size
    while size < section.max_batch_size:
        tried = min(2 * size, section.max_batch_size)
        tried_speed = yield tried
        if tried_speed <= speed:
            break
        size, speed = tried, tried_speed
    while True:
        yield size


def aimd(section: BackpressureConfig, group_size: int, batch_size: int) -> Policy:
    """One prompt more each step, half of them after a step that was slower (Chiu and Jain 1989)."""
    size, before = batch_size, 0.0
    while True:
        speed = yield size
        slower = speed < (1 - SLOWER) * before
        size = max(size // 2, section.min_batch_size) if slower else min(size + 1, section.max_batch_size)
        before = speed


POLICIES: dict[str, OpenPolicy] = {"adaptive": adaptive, "fixed": fixed, "doubling": doubling, "aimd": aimd}


def _turns(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(before, turning point, after) of every change of direction; before and after are the next turns or ends."""
    ends = sizes[:1]
    for size in sizes[1:]:
        if len(ends) > 1 and (size - ends[-1]) * (ends[-1] - ends[-2]) > 0:
            ends[-1] = size
        elif size != ends[-1]:
            ends.append(size)
    return list(zip(ends, ends[1:], ends[2:], strict=False))
