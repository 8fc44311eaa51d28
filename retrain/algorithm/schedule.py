"""Learning rate as a pure function of the step: nothing to checkpoint."""

from __future__ import annotations

import math


def learning_rate(step: int, *, base: float, schedule: str, warmup_steps: int, max_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to `base` over `warmup_steps`, then `schedule` down to zero.

    constant stays at `base`; linear and cosine end at zero one step after the last, so that the last step still learns.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    return base * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
