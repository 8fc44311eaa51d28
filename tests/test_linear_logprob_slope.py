"""linear_logprob of a frozen head with a constant entropy: the gradient that forward takes along."""

from __future__ import annotations

import pytest
import torch

from retrain_kernels import linear_logprob
from retrain_kernels.linear_logprob import reference
from test_linear_logprob import SIZES, LargestAllocation, assert_close, dense, make, relative_error


def gradient(hidden, weight, bias, targets, dtype, cotangent):
    """Of the textbook log-prob, in `dtype`."""
    leaf = hidden.detach().to(dtype).requires_grad_()
    logprob, _ = dense(leaf, weight, bias, targets, 0.7, dtype)
    return torch.autograd.grad((cotangent.to(dtype) * logprob).sum(), leaf)[0]


@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("chunk", [4000, 2**19])
def test_matches_float64(n, v, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(reference, "TILE_ROWS", 16)
    hidden, weight, bias, targets = make(n, v)
    leaf = hidden.clone().requires_grad_()
    logprob, entropy = linear_logprob(leaf, weight, targets, bias=bias, temperature=0.7, entropy_grad=False)
    assert not entropy.requires_grad
    for ours, exact in zip((logprob.detach(), entropy), dense(hidden, weight, bias, targets, 0.7), strict=True):
        assert_close(ours, exact, 3e-6)
    cotangent = torch.randn(n, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((cotangent * logprob).sum(), leaf)
    exact, textbook = (
        gradient(hidden, weight, bias, targets, dtype, cotangent) for dtype in (torch.float64, torch.float32)
    )
    # Of a single row the textbook's error is a single draw, and may be small by luck.
    assert_close(got, exact, max(1.5e-6, (4 if n == 1 else 2) * relative_error(textbook, exact)))


def test_a_nearly_certain_target_keeps_its_digits():
    hidden, weight, _, _ = make(63, 200, 16, bias=False)
    targets = torch.arange(0, 189, 3)
    weight[targets] += 2 * hidden / hidden.square().mean(1, keepdim=True)
    leaf = hidden.clone().requires_grad_()
    logprob, _ = linear_logprob(leaf, weight, targets, temperature=0.7, entropy_grad=False)
    (got,) = torch.autograd.grad(logprob.sum(), leaf)
    ones = torch.ones(63)
    exact, textbook = (gradient(hidden, weight, None, targets, t, ones) for t in (torch.float64, torch.float32))
    assert_close(got, exact, max(1e-5, 2 * relative_error(textbook, exact)))


def test_neither_logits_nor_weights_are_kept(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2**18)
    hidden, weight, _, targets = make(100, 50257, 16, bias=False)
    hidden.requires_grad_()
    saved = []
    with LargestAllocation(hidden, weight, targets) as recorder:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t)
        with hooks:
            logprob, _ = linear_logprob(hidden, weight, targets, entropy_grad=False)
        logprob.sum().backward()
    assert 2**17 < recorder.elements <= 2**18
    assert max(saved) <= weight.numel()


def test_a_head_that_trains_is_recomputed():
    hidden, weight, bias, targets = make(9, 11)
    weight.requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias, entropy_grad=False)
    assert not entropy.requires_grad
    (got,) = torch.autograd.grad(logprob.sum(), weight)
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(dense(hidden, exact, bias, targets, 1.0)[0].sum(), exact)
    assert_close(got, want, 3e-6)
