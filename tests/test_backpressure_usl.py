"""The Universal Scalability Law's fit: published results, closed forms, and a search over everything."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrain
from retrain.backpressure import Usl, fit_usl
from retrain.types import RetrainError

# Gunther, "Guerrilla Capacity Planning" (2007), and the R package usl.
RAYTRACER = [1, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64], [20, 78, 130, 170, 190, 200, 210, 230, 260, 280, 310]
SPECSDM91 = [1, 18, 36, 72, 108, 144, 216], [64.9, 995.9, 1652.4, 1853.2, 1828.9, 1775.0, 1702.2]


def three_digits(value):
    return float(f"{value:.3g}")


def loss(law, p, x):
    return sum((law.throughput(a) - b) ** 2 for a, b in zip(p, x, strict=True))


def best_of_all(p, x):
    """Smallest loss over a fine grid of sigma and kappa; the scale is a linear least-squares problem."""
    p, x = np.asarray(p, float), np.asarray(x, float)
    sigma = np.concatenate([[0], np.logspace(-6, 0, 150)])[:, None, None]
    kappa = np.concatenate([[0], np.logspace(-10, 0, 200)])[None, :, None]
    shape = p / (1 + sigma * (p - 1) + kappa * p * (p - 1))
    scale = (shape * x).sum(-1) / (shape**2).sum(-1)
    return ((scale[..., None] * shape - x) ** 2).sum(-1).min()


def test_raytracer():
    law = retrain.backpressure.fit_usl(*RAYTRACER)
    assert three_digits(law.sigma) == three_digits(0.05777)
    assert law.kappa == 0
    assert three_digits(law.scale) == three_digits(21.849)
    assert law.peak is None


def test_specsdm91():
    law = fit_usl(*SPECSDM91)
    assert three_digits(law.sigma) == three_digits(0.02773)
    assert three_digits(law.kappa) == three_digits(1.044e-4)
    assert three_digits(law.scale) == three_digits(89.995)
    assert three_digits(law.peak) == three_digits(96.52)


def test_the_formula_and_its_peak():
    law = Usl(3.0, 0.1, 0.001)
    assert law.throughput(1) == 3.0
    assert law.throughput(10) == pytest.approx(3.0 * 10 / (1 + 0.1 * 9 + 0.001 * 90))
    at = np.linspace(1, 100, 99001)
    assert law.peak == pytest.approx(at[np.argmax([law.throughput(p) for p in at])], abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-3, 1e6),
    sigma=st.one_of(st.just(0.0), st.floats(1e-3, 0.9)),
    kappa=st.one_of(st.just(0.0), st.floats(1e-6, 1e-2)),
    sizes=st.sets(st.sampled_from([1, 2, 3, 5, 8, 16, 40, 64, 200, 512, 1024]), min_size=4),
)
def test_what_follows_a_law_is_recovered(scale, sigma, kappa, sizes):
    p, truth = sorted(sizes), Usl(scale, sigma, kappa)
    x = [truth.throughput(size) for size in p]
    law = fit_usl(p, x)
    np.testing.assert_allclose([law.throughput(size) for size in p], x, rtol=1e-6)
    if kappa == 0:
        # Of no effect on any of the data.
        assert law.kappa * p[-1] ** 2 < 1e-6 * (1 + sigma * p[-1])


@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_no_law_fits_better(noise):
    rng = np.random.default_rng(7)
    for _ in range(25):
        p = np.sort(rng.choice([1, 2, 3, 4, 8, 16, 32, 64, 100, 256, 512, 1024], rng.integers(3, 10), replace=False))
        truth = Usl(100, 10 ** rng.uniform(-4, 0), rng.choice([0, 10 ** rng.uniform(-7, -2)]))
        x = np.array([truth.throughput(size) for size in p]) * np.exp(rng.normal(0, noise, len(p)))
        law = fit_usl(p, x)
        assert law.scale > 0
        assert 0 <= law.sigma <= 1
        assert 0 <= law.kappa <= 1
        assert loss(law, p, x) <= best_of_all(p, x) * (1 + 1e-6) + 1e-9 * (x @ x)


def test_units_and_order_do_not_matter():
    p, x = SPECSDM91
    law, other = fit_usl(p, x), fit_usl(p[::-1], [1e-9 * value for value in x[::-1]])
    assert (other.sigma, other.kappa) == (pytest.approx(law.sigma, rel=1e-6), pytest.approx(law.kappa, rel=1e-6))
    assert other.scale == pytest.approx(1e-9 * law.scale, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "sigma", "kappa"),
    [
        ([7, 7, 7, 7], 1, 0),  # constant: all of it waits in line
        ([1, 2, 4, 8], 0, 0),  # linear
        ([1, 3, 9, 27], 0, 0),  # better than linear, which the law cannot say
        ([1, 0, 0, 0], 1, 1),  # as bad as the law can say
    ],
)
def test_data_at_the_bounds(x, sigma, kappa):
    law = fit_usl([1, 2, 4, 8], x)
    assert (law.sigma, law.kappa) == (pytest.approx(sigma), pytest.approx(kappa))
    assert (law.peak is None) == (kappa == 0)


@pytest.mark.parametrize(
    ("p", "x", "message"),
    [
        ([4, 4, 4], [1, 2, 3], "1 different concurrencies"),
        ([4, 8, 8], [1, 2, 3], "2 different concurrencies"),
        ([], [], "0 different concurrencies"),
        ([1, 2, 4], [0, 0, 0], "every throughput is 0"),
        ([1, 2, 4], [1, 2], "two lists of one length"),
        ([0, 2, 4], [1, 2, 3], "concurrency must be finite and >= 1; one is 0"),
        ([1, 2, 4], [1, -2, 3], "throughput must be finite and >= 0; one is -2"),
        ([1, 2, 4], [1, float("nan"), 3], "throughput must be finite and >= 0; one is nan"),
        ([1, 2, float("inf")], [1, 2, 3], "concurrency must be finite and >= 1; one is inf"),
    ],
)
def test_data_that_determine_no_law(p, x, message):
    with pytest.raises(RetrainError, match=message):
        fit_usl(p, x)


def test_it_loads_no_torch():
    code = "import sys, retrain; retrain.backpressure.fit_usl([1, 2, 4], [1, 2, 3]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
