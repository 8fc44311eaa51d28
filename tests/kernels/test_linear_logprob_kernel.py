"""The Triton linear_logprob against float64: never more than twice the error of plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch

from retrain_kernels import dispatch, linear_logprob
from retrain_kernels.linear_logprob import kernel
from retrain_kernels.linear_logprob.kernel import Tiles

# Interpreted, a tile costs about the same whatever its size.
WIDE = Tiles(rows=256, vocab=4096, depth=64, warps=4, stages=2) if dispatch.interpreting() else None
SMALL = Tiles(rows=16, vocab=32, depth=16, warps=4, stages=2, band=3)
ULPS = 8 * torch.finfo(torch.float32).eps


def make(n, v, d, device, *, dtype=torch.float32, bias=False, seed=0):
    """Hidden states and a head whose logits spread as a language model's do (standard deviation 3)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(device, dtype)
    weight = (torch.randn(v, d, generator=g) * 3 / d**0.5).to(device, dtype)
    offsets = torch.randn(v, generator=g).to(device, dtype) if bias else None
    return hidden, weight, offsets, torch.randint(v, (n,), generator=g).to(device)


def run(function, inputs, cotangents, frozen=False):
    """Log-prob and entropy, and the gradients of every input that is there; of a frozen head's hidden states alone."""
    leaves = [x if x is None or (frozen and i) else x.detach().clone().requires_grad_() for i, x in enumerate(inputs)]
    outputs = function(*leaves)
    sum((c * o).sum() for c, o in zip(cotangents, outputs, strict=True)).backward()
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad)]


def textbook(targets, temperature, dtype, rows=512):
    """Full logits in `dtype`, then a softmax in at least float32, as trainers do it; a slice of rows at a time."""

    def compute(hidden, weight, bias):
        parts = []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = torch.nn.functional.linear(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            log_p = torch.log_softmax(logits.to(torch.promote_types(dtype, torch.float32)) / temperature, -1)
            parts.append((log_p.gather(1, t[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    return compute


def error(got, want):
    """Relative root mean square error."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check(inputs, targets, *, temperature=1.0, tiles=None, frozen=False, entropy_grad=True):
    dtype = inputs[0].dtype
    cotangents = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1)).to(targets.device)
    if not entropy_grad:
        cotangents[1] = 0
    exact = [None if x is None else x.double() for x in inputs]
    want = run(textbook(targets, temperature, torch.float64), exact, cotangents.double(), frozen)
    plain = run(textbook(targets, temperature, dtype), inputs, cotangents, frozen)
    fused = lambda h, w, b: kernel.linear_logprob(h, w, targets, b, temperature, entropy_grad, tiles=tiles)  # noqa: E731
    for i, (got, torchs, exact) in enumerate(zip(run(fused, inputs, cotangents, frozen), plain, want, strict=True)):
        assert got.dtype == (torch.float32 if i < 2 else dtype)
        floor = ULPS if got.dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert error(got, exact) <= max(2 * error(torchs, exact), floor), (i, error(got, exact), error(torchs, exact))


@pytest.mark.parametrize("n", [1, 63, 500, 1000, 4097])
@pytest.mark.parametrize("v", [11, 1000])
def test_float32_against_float64(device, n, v):
    # An odd width, and no multiple of any tile.
    hidden, weight, bias, targets = make(n, v, 33, device, bias=True)
    check((hidden, weight, bias), targets, temperature=0.7, tiles=WIDE)


@pytest.mark.parametrize("n", [1, 63, *(pytest.param(n, marks=pytest.mark.large) for n in (500, 1000))])
def test_the_largest_vocabulary(device, n):
    hidden, weight, _, targets = make(n, 151936, 20, device)
    check((hidden, weight, None), targets, tiles=WIDE, frozen=True)


@pytest.mark.parametrize("n", [1, 63, *(pytest.param(n, marks=pytest.mark.large) for n in (500, 1000, 4097))])
def test_a_vocabulary_of_50257(device, n):
    hidden, weight, _, targets = make(n, 50257, 24, device)
    check((hidden, weight, None), targets, tiles=WIDE, frozen=True, entropy_grad=n % 2 == 0)


@pytest.mark.large
def test_the_largest_of_all(device):
    hidden, weight, _, targets = make(4097, 151936, 16, device)
    check((hidden, weight, None), targets, tiles=WIDE, frozen=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "v"), [(1, 11), (500, 1000), (63, 50257), (7, 151936)])
def test_low_precision_against_float64(device, dtype, n, v):
    hidden, weight, bias, targets = make(n, v, 64, device, dtype=dtype, bias=True)
    check((hidden, weight, bias), targets, temperature=1.3, tiles=WIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "v", "d"), [(3, 2, 16), (16, 32, 16), (17, 33, 17), (63, 200, 48), (130, 65, 5)])
def test_small_tiles_slices_and_bands(device, monkeypatch, dtype, n, v, d):
    monkeypatch.setattr(kernel, "MAX_ROWS", 48)
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 48 * 64)
    hidden, weight, bias, targets = make(n, v, d, device, dtype=dtype, bias=True)
    check((hidden, weight, bias), targets, temperature=0.7, tiles=SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "v", "d", "tiles"), [(63, 200, 48, SMALL), (130, 65, 5, SMALL), (500, 1000, 33, WIDE)])
def test_the_log_prob_alone_of_a_frozen_head(device, monkeypatch, dtype, n, v, d, tiles):
    monkeypatch.setattr(kernel, "MAX_ROWS", 256 if tiles is WIDE else 48)
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 48 * 64)
    hidden, weight, bias, targets = make(n, v, d, device, dtype=dtype, bias=True)
    check((hidden, weight, bias), targets, temperature=0.7, tiles=tiles, frozen=True, entropy_grad=False)


def test_a_nearly_certain_target(device):
    # The gradient is a small difference of large terms, and the log-prob next to 0: both keep their digits.
    hidden, weight, _, _ = make(63, 200, 16, device)
    targets = torch.arange(0, 189, 3, device=device)
    weight[targets] += 2 * hidden / hidden.square().mean(1, keepdim=True)
    check((hidden, weight, None), targets, tiles=SMALL, frozen=True, entropy_grad=False)
    leaf = hidden.clone().requires_grad_()
    logprob, _ = linear_logprob(leaf, weight, targets, entropy_grad=False, impl="triton")
    assert logprob.max() > -1e-7
    assert (logprob < 0).all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_an_impossible_target(device):
    hidden, weight, _, targets = make(63, 200, 16, device)
    hidden[5] *= 100
    targets[5] = (hidden[5] @ weight.t()).argmin()
    assert textbook(targets, 1.0, torch.float64)(hidden, weight, None)[0][5] < -200
    check((hidden, weight, None), targets, tiles=SMALL, frozen=True, entropy_grad=False)


def test_a_constant_entropy_has_no_gradient(device):
    hidden, weight, _, targets = make(9, 20, 16, device)
    for leaf, head in [(hidden.clone().requires_grad_(), weight), (hidden, weight.clone().requires_grad_())]:
        logprob, entropy = linear_logprob(leaf, head, targets, entropy_grad=False, impl="triton")
        assert logprob.requires_grad
        assert not entropy.requires_grad


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes any tile: this compares compiled programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tiles_of_this_gpu(device, dtype):
    hidden, weight, bias, targets = make(4097, 50257, 2560, device, dtype=dtype, bias=True)
    check((hidden, weight, bias), targets)


def test_float16_keeps_gradients_that_its_range_would_lose(device):
    # Of a loss divided by 8192 tokens, d loss / d logit of most tokens lies below float16's smallest number.
    hidden, weight, _, targets = make(63, 1000, 64, device, dtype=torch.float16)
    exact = run(textbook(targets, 1.0, torch.float64), (hidden.double(), weight.double(), None), torch.ones(2, 63))
    tiny = torch.full((2, 63), 2.0**-13, device=device)
    tiny[:, ::2] *= 3
    exact = run(textbook(targets, 1.0, torch.float64), (hidden.double(), weight.double(), None), tiny.double())
    got = run(lambda h, w, b: linear_logprob(h, w, targets, impl="triton"), (hidden, weight, None), tiny)
    assert error(got[2], exact[2]) < 1e-3
    assert error(got[3], exact[3]) < 1e-2  # the result itself is subnormal in float16


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_one_output_or_none_in_the_loss(device, which):
    hidden, weight, _, targets = make(63, 200, 16, device)
    cotangents = torch.randn(2, 63, device=device) * torch.tensor(which, device=device)[:, None]
    leaf = hidden.clone().requires_grad_()
    outputs = linear_logprob(leaf, weight, targets, impl="triton")
    sum(
        (c * o).sum() for c, o, used in zip(cotangents, outputs, which, strict=True) if used or not any(which)
    ).backward()
    want = run(textbook(targets, 1.0, torch.float64), (hidden.double(), weight.double(), None), cotangents.double())[2]
    if any(which):
        assert error(leaf.grad, want) < 2e-6
    else:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_layouts_dtypes_and_targets(device):
    hidden, weight, _, targets = make(63, 200, 33, device)
    want = linear_logprob(hidden, weight, targets, impl="reference")
    strided = torch.randn(63, 66, device=device)[:, ::2].copy_(hidden)
    padded = torch.randn(256, 40, device=device)
    padded[:200, :33] = weight
    for h, w, t in [
        (strided, weight, targets.int()),
        (hidden, padded[:200, :33], torch.stack([targets, targets], 1)[:, 0]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), targets),
    ]:
        for ours, theirs in zip(linear_logprob(h, w, t, impl="triton"), want, strict=True):
            assert error(ours, theirs) < 1e-6
    mixed = linear_logprob(hidden, weight.bfloat16(), targets, impl="triton")
    for ours, theirs in zip(mixed, textbook(targets, 1.0, torch.float64)(hidden, weight.bfloat16(), None), strict=True):
        assert error(ours, theirs) < 1e-6


def test_large_logits_stay_accurate(device):
    hidden, weight, _, targets = make(63, 1000, 16, device)
    hidden = hidden * 100
    logprob, entropy = linear_logprob(hidden, weight, targets, impl="triton")
    want = textbook(targets, 1.0, torch.float64)(hidden, weight, None)
    assert error(logprob, want[0]) < 1e-6
    assert (entropy - want[1]).abs().max() < 2e-4
    assert (entropy >= 0).all()


def test_no_rows(device):
    hidden, weight, bias, targets = make(0, 11, 8, device, bias=True)
    got = run(lambda h, w, b: linear_logprob(h, w, targets, bias=b, impl="triton"), (hidden, weight, bias), [1.0, 1.0])
    assert [tuple(x.shape) for x in got] == [(0,), (0,), (0, 8), (11, 8), (11,)]
    assert not got[3].any()
    assert not got[4].any()


def test_a_frozen_head_takes_no_gradient_memory(device, monkeypatch):
    hidden, weight, bias, targets = make(63, 200, 16, device, bias=True)
    taken = []
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **k: (taken.append(x.shape), zeros(x, **k))[1])
    leaf = hidden.requires_grad_()
    linear_logprob(leaf, weight, targets, bias=bias, impl="triton")[0].sum().backward()
    assert leaf.grad is not None
    assert weight.shape not in taken
    assert bias.shape not in taken


def test_the_same_bits_twice(device):
    *inputs, targets = make(130, 200, 33, device)
    cotangents = torch.ones(2, 130, device=device)
    first, second = (
        run(lambda h, w, b: linear_logprob(h, w, targets, impl="triton"), inputs, cotangents) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing(device):
    hidden, weight, _, targets = make(63, 200, 16, device)
    results = []
    for enabled in (False, True):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            logprob, entropy = linear_logprob(leaf, weight, targets, impl="triton")
            (logprob + entropy).sum().backward()
        results.append((logprob, entropy, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_second_derivative_is_refused(device):
    hidden, weight, _, targets = make(3, 11, 8, device)
    scale = torch.ones(3, requires_grad=True, device=device)
    hidden.requires_grad_()
    loss = (scale * linear_logprob(hidden, weight, targets, impl="triton")[0]).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_input_is_refused_before_any_launch(device, monkeypatch):
    hidden, weight, _, targets = make(3, 11, 8, device)
    monkeypatch.setattr(kernel, "linear_logprob", lambda *args: pytest.fail("launched"))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 11\), got 11"):
        linear_logprob(hidden, weight, targets + 11 - targets, impl="triton")
    with pytest.raises(RuntimeError, match="float32 and a tensor is float64"):
        linear_logprob(hidden.double(), weight, targets, impl="triton")
