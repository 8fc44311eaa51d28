"""The schedule of SEPA's pooling strength lambda. Torch-free; its whole state is a JSON-able dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from retrain.algorithm.choices import check_choice
from retrain.types import RetrainError


@dataclass(frozen=True)
class SepaState:
    """All that the controller remembers.

    gate_open: whether a batch's correct rate ever reached the gate. variance: exponential moving average of the
    execution-uncertainty variance, None before the first; updates: how many went into it; baseline: its value after
    `warmup` updates, None before.
    """

    gate_open: bool = False
    variance: float | None = None
    updates: int = 0
    baseline: float | None = None


class SepaController:
    """Gives each training step its lambda in [0, 1].

    A step asks `value(step, correct_rate)` before it trains: its own correct rate may open the gate, while the
    variance is the one known from the steps before, since this step's comes out of the forward pass that lambda
    goes into. After the forward pass it reports `observe(exec_variance)`.

    steps, delay_steps: the linear ramp, clip((step - delay_steps) / steps, 0, 1); steps = 0 means no ramp, 0.
    schedule: "linear", or "auto": the larger of the ramp and 1 - min((v / v0) / variance_threshold, 1), where v is
    the EMA (ema_decay; the first variance starts it) and v0 that EMA after `warmup` updates. Until v0 is there, or
    where it is 0 (nothing to pool), the ramp alone counts.
    correct_rate_gate: lambda is 0 until a step's correct rate reaches it, and never shut again; 0 is always open.
    """

    def __init__(
        self,
        steps: int,
        schedule: str,
        delay_steps: int,
        correct_rate_gate: float,
        ema_decay: float,
        variance_threshold: float,
        warmup: int,
    ) -> None:
        check_choice("sepa.schedule", schedule, _SCHEDULES)
        self._steps = steps
        self._schedule = _SCHEDULES[schedule]
        self._delay_steps = delay_steps
        self._correct_rate_gate = correct_rate_gate
        self._ema_decay = ema_decay
        self._variance_threshold = variance_threshold
        self._warmup = warmup
        self._state = SepaState(gate_open=correct_rate_gate <= 0)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], **section: Any) -> SepaController:
        """Rebuild a controller from `state()` and the constructor's arguments. Raises RetrainError on a foreign one."""
        controller = cls(**section)
        names = {field.name for field in fields(SepaState)}
        if set(state) != names:
            raise RetrainError(
                f"SEPA state of the checkpoint has keys {sorted(state)}, expected {sorted(names)}; "
                "resume from an earlier checkpoint"
            )
        restored = SepaState(**state)
        controller._state = replace(restored, gate_open=restored.gate_open or controller.gate_open)
        return controller

    def state(self) -> dict[str, Any]:
        """The whole state, for a checkpoint: JSON types only."""
        return asdict(self._state)

    @property
    def gate_open(self) -> bool:
        """Whether lambda may be above 0."""
        return self._state.gate_open

    def value(self, step: int, correct_rate: float | None) -> float:
        """Lambda of a step, before it trains. correct_rate: share of right answers in its batch; None opens nothing."""
        if correct_rate is not None and correct_rate >= self._correct_rate_gate:
            self._state = replace(self._state, gate_open=True)
        return self._schedule(self, step) if self._state.gate_open else 0.0

    def observe(self, exec_variance: float | None) -> None:
        """Take in a step's variance of execution uncertainty, after its forward pass; None: it had no such tokens."""
        if exec_variance is None:
            return
        if not (math.isfinite(exec_variance) and exec_variance >= 0):
            raise ValueError(f"exec_variance must be a finite number >= 0, got {exec_variance}")
        state, decay = self._state, self._ema_decay
        variance = exec_variance if state.variance is None else decay * state.variance + (1 - decay) * exec_variance
        updates = state.updates + 1
        baseline = variance if state.baseline is None and updates >= self._warmup else state.baseline
        self._state = replace(state, variance=variance, updates=updates, baseline=baseline)

    def _linear(self, step: int) -> float:
        if self._steps == 0:
            return 0.0
        return min(max((step - self._delay_steps) / self._steps, 0.0), 1.0)

    def _auto(self, step: int) -> float:
        variance, baseline = self._state.variance, self._state.baseline
        if variance is None or not baseline:
            return self._linear(step)
        return max(self._linear(step), 1 - min(variance / baseline / self._variance_threshold, 1.0))


_SCHEDULES: dict[str, Callable[[SepaController, int], float]] = {
    "linear": SepaController._linear,
    "auto": SepaController._auto,
}
