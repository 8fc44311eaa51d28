"""The Universal Scalability Law, and its fit to measured throughput.

X(p) = scale * p / (1 + sigma (p - 1) + kappa p (p - 1))

p: concurrency; X: throughput; sigma: contention (what waits in line); kappa: coherency (what every pair costs). N. J.
Gunther, "Guerrilla Capacity Planning" (Springer 2007); fitted here by bounded non-linear least squares, not by
the linearised regression, whose result differs materially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrain.types import RetrainError

# Three parameters: fewer different concurrencies leave them undetermined.
MIN_SIZES = 3
# Of the scaled problem, whose values are of order 1.
TOLERANCE = 1e-12
# A parameter of the scaled problem that changes no throughput by more than this share is 0.
ROUNDING = 1e-9
# Of its sigma and kappa, where the search begins; those above the bounds are put on them.
GRID = np.concatenate([[0.0], np.logspace(-3, 6, 37), [np.inf]])


@dataclass(frozen=True)
class Usl:
    """A fitted law. scale: throughput at p = 1, in the unit of the data; sigma, kappa: in [0, 1], no unit."""

    scale: float
    sigma: float
    kappa: float

    @property
    def peak(self) -> float | None:
        """Concurrency of the highest throughput, sqrt((1 - sigma) / kappa); None with kappa = 0: it never falls."""
        return math.sqrt((1 - self.sigma) / self.kappa) if self.kappa > 0 else None

    def throughput(self, concurrency: float) -> float:
        """X(p), in the unit of the data."""
        p = concurrency
        return self.scale * p / (1 + self.sigma * (p - 1) + self.kappa * p * (p - 1))


def fit_usl(concurrency: Sequence[float], throughput: Sequence[float]) -> Usl:
    """The law with the smallest sum of squared residuals, scale > 0 and sigma and kappa in [0, 1].

    concurrency: each >= 1, at least three different ones. throughput: each >= 0, in any unit, not all 0. Constant
    throughput is sigma = 1, kappa = 0; throughput that only grows faster than p is sigma = kappa = 0.
    Raises RetrainError for data that determine no law.
    """
    p, x = np.asarray(concurrency, dtype=np.float64), np.asarray(throughput, dtype=np.float64)
    _check(p, x)
    # In units of the largest concurrency and throughput every parameter is of order 1.
    largest, highest = p.max(), x.max()
    scaled = _least_squares(p / largest, x / highest, 1 / largest)
    scale, sigma, kappa = scaled * (highest / largest, 1 / largest, 1 / largest**2)
    return Usl(float(scale), min(float(sigma), 1.0), min(float(kappa), 1.0))


def _check(p: np.ndarray, x: np.ndarray) -> None:
    if p.ndim != 1 or p.shape != x.shape:
        raise RetrainError(
            f"fit_usl: concurrency and throughput must be two lists of one length; their shapes are {p.shape} and "
            f"{x.shape}"
        )
    for name, values, least in (("concurrency", p, 1), ("throughput", x, 0)):
        bad = ~(np.isfinite(values) & (values >= least))
        if bad.any():
            raise RetrainError(f"fit_usl: {name} must be finite and >= {least}; one is {values[bad][0]:g}")
    sizes = len(np.unique(p))
    if sizes < MIN_SIZES:
        raise RetrainError(
            f"fit_usl: {sizes} different concurrencies leave the law undetermined; measure at least {MIN_SIZES}"
        )
    if not x.any():
        raise RetrainError("fit_usl: every throughput is 0; there is nothing to fit")


def _least_squares(q: np.ndarray, y: np.ndarray, unit: float) -> np.ndarray:
    """[a, s, k] of y = a q / (1 + s (q - unit) + k q (q - unit)); q = p / p_max, unit = 1 / p_max."""
    # Loading it takes longer than `import retrain` may.
    from scipy.optimize import least_squares

    linear, square = q - unit, q * (q - unit)
    limits = np.array([np.inf, 1 / unit, 1 / unit**2])

    def residuals(t: np.ndarray) -> np.ndarray:
        return t[0] * q / (1 + t[1] * linear + t[2] * square) - y

    def jacobian(t: np.ndarray) -> np.ndarray:
        damping = 1 / (1 + t[1] * linear + t[2] * square)
        slope = q * damping
        curve = t[0] * slope * damping
        return np.stack([slope, -curve * linear, -curve * square], axis=1)

    slopes: Any = jacobian  # least_squares annotates its default only
    bounds = (np.zeros(3), limits)
    found = [
        # dogbox puts a parameter on its bound exactly, which is what kappa = 0 is read from.
        least_squares(residuals, start, slopes, bounds, method="dogbox", xtol=TOLERANCE, ftol=TOLERANCE, gtol=TOLERANCE)
        for start in _starts(q, y, linear, square, limits)
    ]
    best = min(found, key=lambda result: result.cost).x
    return np.where(best < ROUNDING, 0.0, best)


def _starts(
    q: np.ndarray, y: np.ndarray, linear: np.ndarray, square: np.ndarray, limits: np.ndarray
) -> list[np.ndarray]:
    """The best two of a coarse grid of s and k, with k = 0 and above; a is linear and so known.

    Noisy data may have a minimum of either kind.
    """
    _, s, k = np.minimum(GRID, limits[:, None])
    shape = q / (1 + s[:, None, None] * linear + k[:, None] * square)
    a = (shape @ y) / (shape**2).sum(axis=-1)
    cost = ((a[..., None] * shape - y) ** 2).sum(axis=-1)
    flat = cost[:, 0].argmin()
    i, j = np.unravel_index(cost[:, 1:].argmin(), cost[:, 1:].shape)
    return [np.array([a[flat, 0], s[flat], 0.0]), np.array([a[i, j + 1], s[i], k[j + 1]])]
