"""The batch size of each step, from the throughput of the steps before it: `[backpressure]`.

Warm-up tries geometrically growing sizes. After it, every step fits the Universal Scalability Law to what was measured
and compares the concurrency p = batch size * group size with the law's peak p*. A decision is a pure function of the
state: what a checkpoint holds decides what a resumed run does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from retrain.backpressure.roofline import Roofline, open_roofline
from retrain.backpressure.usl import MIN_SIZES, Usl, fit_usl
from retrain.types import RetrainError

if TYPE_CHECKING:
    from retrain.config import BackpressureConfig, Config

WINDOW = 100

Action = Literal["warmup", "throttle", "increase", "hold"]
Regime = Literal["unknown", "rising", "peak", "retrograde"]


@dataclass(frozen=True)
class State:
    """All that is remembered.

    batch_size: the size that is held, throttled or increased; a warm-up leaves it alone. steps: finished ones.
    throttled: whether it was ever lowered. window: (batch size, tokens per second) of up to WINDOW steps, oldest first.
    """

    batch_size: int
    steps: int = 0
    throttled: bool = False
    window: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Decision:
    """The size of a step, and why.

    action: warmup (a trial), throttle, increase or hold: what became of the size before. regime: where that size stood
    by the law: rising (far below the target), peak (about there), retrograde (above), or unknown without a law.
    law: the fit that it was decided on.
    """

    batch_size: int
    action: Action
    regime: Regime
    law: Usl | None = None


def warmup_sizes(section: BackpressureConfig) -> list[int]:
    """Sizes that the warm-up tries in turn, over and over: min, the powers of two in between, max.

    At least three, where there are as many.
    """
    least, most = section.min_batch_size, section.max_batch_size
    between = [2**k for k in range(most.bit_length()) if least < 2**k < most] or [(least + most) // 2]
    return sorted({least, *between, most})


def in_warmup(state: State, section: BackpressureConfig) -> bool:
    """Through `warmup_steps`, and until enough sizes are measured to fit a law to."""
    measured = len({size for size, _ in state.window})
    return state.steps < section.warmup_steps or measured < min(MIN_SIZES, len(warmup_sizes(section)))


def decide(state: State, section: BackpressureConfig, group_size: int) -> Decision:
    """The next step's batch size, within min_batch_size and max_batch_size."""
    if in_warmup(state, section):
        sizes = warmup_sizes(section)
        return Decision(sizes[state.steps % len(sizes)], "warmup", "unknown")
    law = fit_window(state.window, group_size, section.ema_decay)
    if law is None:
        return Decision(state.batch_size, "hold", "unknown")
    size, most = state.batch_size, section.max_batch_size
    # Without a peak more is never slower: the aim lies beyond every size.
    aim = section.throttle_margin * (math.inf if law.peak is None else law.peak) / group_size
    target = max(math.floor(min(aim, most)), section.min_batch_size)
    if size > aim:
        return Decision(target, "throttle" if target < size else "hold", "retrograde", law)
    # A size once lowered is not raised because a fit, for a moment, sees no peak within reach. (0 * inf is nan, and
    # nothing is below nan: with increase_margin = 0 the size never grows.)
    floor = section.increase_margin * (min(aim, most) if state.throttled else aim)
    if size < floor:
        return Decision(target, "increase" if target > size else "hold", "rising", law)
    return Decision(size, "hold", "peak", law)


def observe(state: State, decision: Decision, throughput: float | None) -> State:
    """The state after a step that `decision` gave its size. throughput: tokens/s, > 0; None: nothing was measured."""
    state = replace(
        state,
        batch_size=state.batch_size if decision.action == "warmup" else decision.batch_size,
        steps=state.steps + 1,
        throttled=state.throttled or decision.action == "throttle",
    )
    if throughput is None:
        return state
    return replace(state, window=_slid((*state.window, (decision.batch_size, throughput))))


def fit_window(window: Sequence[tuple[int, float]], group_size: int, ema_decay: float) -> Usl | None:
    """The law of a window, None with fewer than three different sizes in it.

    Each size is one point, the exponential moving average of its own measurements: weighting the points by how many
    went into them would let the size that is held decide alone, and every tremor of its average move the peak.
    """
    series: dict[int, list[float]] = {}
    for size, rate in window:
        series.setdefault(size, []).append(rate)
    if len(series) < MIN_SIZES:
        return None
    return fit_usl([size * group_size for size in series], [average(rates, ema_decay) for rates in series.values()])


def average(values: Sequence[float], decay: float) -> float:
    """Exponential moving average, newest last, its weights brought to sum 1: the first value is no heavier for it."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _slid(window: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """The newest WINDOW measurements; the oldest of the size that has most goes first.

    By age alone, a hundred steps at one size would push out all others, and nothing could be fitted any more.
    """
    if len(window) <= WINDOW:
        return window
    counts = Counter(size for size, _ in window)
    most = max(counts.values())
    oldest = next(i for i, (size, _) in enumerate(window) if counts[size] == most)
    return window[:oldest] + window[oldest + 1 :]


def throughput(stages: Iterable[tuple[int, float]]) -> float | None:
    """Tokens per second through all stages, each (tokens, seconds): 1 / (sum of seconds per token).

    None where a stage had no token, or took no time: its pace is not known.
    """
    stages = list(stages)
    if any(tokens == 0 or seconds <= 0 for tokens, seconds in stages):
        return None
    return 1 / sum(seconds / tokens for tokens, seconds in stages)


class Controller:
    """Gives each step of a run its `batch_size`, and is told what the step took.

    roofline: label of a concurrency, None without hints.
    """

    def __init__(
        self, section: BackpressureConfig, group_size: int, state: State, roofline: Roofline | None = None
    ) -> None:
        self._section, self._group_size, self._roofline = section, group_size, roofline
        self._state = state
        self._decision = decide(state, section, group_size)

    @property
    def batch_size(self) -> int:
        """Prompts of the step that comes next."""
        return self._decision.batch_size

    def finish_step(self, stages: Iterable[tuple[int, float]]) -> dict[str, Any]:
        """A step of `batch_size` prompts is done. stages: (tokens, seconds) of its sampling and of its training.

        Returns its figures for the metrics: how its size came about, by which law, and what was measured.
        """
        decision, law, rate = self._decision, self._decision.law, throughput(stages)
        concurrency = decision.batch_size * self._group_size
        self._state = observe(self._state, decision, rate)
        self._decision = decide(self._state, self._section, self._group_size)
        return {
            "bp_action": decision.action,
            "bp_regime": decision.regime,
            "bp_p": concurrency,
            "bp_p_star": law.peak if law else None,
            "bp_scale": law.scale if law else None,
            "bp_sigma": law.sigma if law else None,
            "bp_kappa": law.kappa if law else None,
            "bp_throughput": rate,
            "bp_roofline": self._roofline(concurrency) if self._roofline else None,
        }

    def state(self) -> dict[str, Any]:
        """The whole state, for a checkpoint: JSON types only."""
        return asdict(self._state)


def open_controller(config: Config, state: Mapping[str, Any] | None = None) -> Controller | None:
    """The controller of a run, None without `backpressure.enabled`. state: `Controller.state()` of a checkpoint.

    Raises RetrainError for a foreign state.
    """
    if not config.backpressure.enabled:
        return None
    begun = restore(state) if state else State(config.training.batch_size)
    return Controller(config.backpressure, config.training.group_size, begun, open_roofline(config))


def restore(values: Mapping[str, Any]) -> State:
    """The state of a checkpoint. Raises RetrainError on a foreign one."""
    names = {field.name for field in fields(State)}
    if set(values) != names:
        raise RetrainError(
            f"backpressure state of the checkpoint has keys {sorted(values)}, expected {sorted(names)}; "
            "resume from an earlier checkpoint"
        )
    return State(**{**values, "window": tuple((int(size), float(rate)) for size, rate in values["window"])})
