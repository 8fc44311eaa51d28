"""Batches are ordered `max_staleness` steps before they train: one loop, on-policy (0) or with sampling ahead.

Batch k is sampled from the policy that max(0, k - max_staleness) steps have made, whether the sampling overlaps the
training (where the engine has a device or a server of its own) or takes turns with it: only the clock can tell.

A checkpoint keeps the policies that sample the batches ahead, not the batches: a resumed run orders them again, and
nobody waits for a batch to write a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from retrain.backend import Backend
from retrain.inference import Engine
from retrain.loops import Worker
from retrain.training.collect import Collected, Collector
from retrain.training.stopwatch import Stopwatch
from retrain.types import RetrainError

if TYPE_CHECKING:
    from retrain.backend.local import LocalBackend

T = TypeVar("T")
# For a batch that is being sampled when the run ends: what is left of it then goes with the process.
END_S = 5.0


@dataclass(frozen=True)
class Sampled:
    """A batch, the policy version that sampled it, and what its sampling took (`Stopwatch.stages`)."""

    batch: Collected
    version: int
    stages: Mapping[str, float]


@dataclass(frozen=True)
class _Order:
    """policy: the snapshot of the version that samples, where it may be needed again. sampled: None for a batch beyond
    the last step, which only a run that is prolonged will want."""

    version: int
    policy: bytes
    sampled: Future[Sampled] | None


class Pipeline:
    """staleness: of `training.max_staleness`. prompts_used: of the steps that are finished (`TrainerState`)."""

    def __init__(
        self,
        engine: Engine,
        collector: Collector,
        backend: Backend,
        *,
        staleness: int,
        max_steps: int,
        prompts_used: int,
    ) -> None:
        self.engine, self.collector, self.backend = engine, collector, backend
        self.staleness, self.max_steps = staleness, max_steps
        self.worker = Worker("sampling") if staleness and engine.overlaps else None
        self._orders: dict[int, _Order] = {}
        self._last: Future[Sampled] | None = None
        self._prompts_used = prompts_used

    def take(self, step: int, version: int, batch_size: int, watch: Stopwatch) -> Sampled:
        """The batch that `step` (from 0) trains on, once what can be sampled from the policy as it is now, `version`,
        is ordered. watch: takes what the order and the wait for it took, and the stages of the batch's own sampling.

        Raises what its sampling raised.
        """
        for done in [one for one in self._orders if one < step]:
            del self._orders[done]
        with watch("sync"):
            self.engine.stage(version)
        for ahead in range(step, step + self.staleness + 1):
            if ahead not in self._orders:
                self._order(ahead, version, self._snapshot(), batch_size)
        ordered = self._orders[step].sampled
        assert ordered is not None  # its step is not the last one's successor
        with watch("wait"):
            sampled = ordered.result()
        watch.add(sampled.stages)
        return sampled

    def evaluate(self, version: int, work: Callable[[], T]) -> T:
        """What `work` finds with the policy as it is now, after the batches that are ordered."""
        self.engine.stage(version)

        def job() -> T:
            self.engine.use(version)
            return work()

        return self._submit(job).result()

    def _snapshot(self) -> bytes:
        return self._local.snapshot() if self.staleness else b""

    @property
    def _local(self) -> LocalBackend:
        """With a service, `staleness` is 0: the config's checks see to it."""
        return cast("LocalBackend", self.backend)

    def _order(self, step: int, version: int, policy: bytes, batch_size: int) -> None:
        """The policy is staged."""
        if step >= self.max_steps:
            self._orders[step] = _Order(version, policy, None)
            return
        before = self._last

        def job() -> Sampled:
            # A batch after one that failed does not know its prompts: it fails likewise.
            first = before.result().batch.prompts_used if before else self._prompts_used
            watch = Stopwatch()
            with watch("sync"):
                self.engine.use(version)
            batch = self.collector.collect(step, first, version, watch, batch_size)
            return Sampled(batch, version, watch.stages)

        self._last = self._submit(job)
        self._orders[step] = _Order(version, policy, self._last)

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        if self.worker is not None:
            return self.worker.submit(job)
        found: Future[T] = Future()
        try:
            found.set_result(job())
        except RetrainError as error:
            found.set_exception(error)
        return found

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def ahead(self, step: int) -> list[list[int]]:
        """[step, policy version that samples it] of the batches that were ordered when `step` steps are finished.

        Without those that the next step orders: their policy is the checkpoint's own.
        """
        return [[k, order.version] for k, order in self._orders.items() if step <= k < step + self.staleness]

    def save(self, folder: Path, step: int) -> None:
        """Write the policies of `ahead`."""
        for k, version in self.ahead(step):
            (folder / policy_file(version)).write_bytes(self._orders[k].policy)

    def close(self) -> None:
        """A batch that is being sampled is given up."""
        if self.worker is not None:
            self.engine.close()
            self.worker.close(END_S)

    def restore(self, folder: Path, ahead: Sequence[Sequence[int]], batch_size: int) -> None:
        """Order the batches of a checkpoint again. The backend has another adapter afterwards: its state is yet to be
        loaded."""
        for step, version in ahead:
            policy = (folder / policy_file(version)).read_bytes()
            self._local.put(policy)
            self.engine.stage(version)
            self._order(step, version, policy, batch_size)


def policy_file(version: int) -> str:
    """Name of the file of a checkpoint that holds the snapshot of an older policy."""
    return f"policy_{version:06d}.safetensors"
