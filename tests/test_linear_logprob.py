"""linear_logprob against float64 softmax, a plain-Python oracle, and its memory promise."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from retrain_kernels import linear_logprob
from retrain_kernels.linear_logprob import reference

SIZES = [(0, 11), (1, 11), (63, 11), (500, 11), (1000, 11), (63, 1000), (500, 1000), (1, 50257), (7, 50257)]


def make(n, v, d=8, *, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(n, d), draw(v, d), draw(v) if bias else None, torch.randint(v, (n,), generator=g)


def dense(hidden, weight, bias, targets, temperature, dtype=torch.float64):
    """The textbook computation with the full logits."""
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def gradients(function, inputs, coefficients):
    """Gradients of a fixed linear combination of log-probs and entropies."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    sum((c.to(o.dtype) * o).sum() for c, o in zip(coefficients, outputs, strict=True)).backward()
    return [leaf.grad for leaf in leaves]


def relative_error(got, want):
    """Relative root-mean-square error, as one number for a whole tensor."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / max(want.double().norm().item(), 1e-30)).item()


def assert_close(got, want, tolerance):
    error = relative_error(got, want)
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_float64_forward_and_backward(n, v, temperature):
    hidden, weight, bias, targets = make(n, v)
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)
    want = dense(hidden, weight, bias, targets, temperature)
    assert logprob.dtype == entropy.dtype == torch.float32
    assert logprob.shape == entropy.shape == (n,)
    assert_close(logprob, want[0], 1e-6)
    assert_close(entropy, want[1], 3e-6)

    coefficients = torch.randn(2, n, generator=torch.Generator().manual_seed(1))
    got = gradients(
        lambda h, w, b: linear_logprob(h, w, targets, bias=b, temperature=temperature),
        (hidden, weight, bias),
        coefficients,
    )
    textbook, want = (
        gradients(
            lambda h, w, b: dense(h, w, b, targets, temperature, dtype),  # noqa: B023
            [x.to(dtype) for x in (hidden, weight, bias)],
            coefficients,
        )
        for dtype in (torch.float32, torch.float64)
    )
    # A gradient over many tokens cancels: the yardstick is the error that PyTorch itself makes in float32.
    for ours, torchs, exact in zip(got, textbook, want, strict=True):
        assert_close(ours, exact, max(1.5e-6, 2 * relative_error(torchs, exact)))


@pytest.mark.parametrize("temperature", [1.0, 0.35])
def test_matches_the_oracle(temperature):
    hidden, weight, bias, targets = make(5, 11, dtype=torch.float64)
    got = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)
    want = [
        oracle.linear_logprob(h, weight.tolist(), t, bias.tolist(), temperature)
        for h, t in zip(hidden.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(torch.stack(got, 1), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_both_outputs_over_several_chunks(monkeypatch, rows, bias):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 11 * rows)
    hidden, weight, b, targets = make(5, 11, 3, dtype=torch.float64, bias=bias)
    inputs = [x.requires_grad_() for x in (hidden, weight, b) if x is not None]

    def run(h, w, b=None):
        return linear_logprob(h, w, targets, bias=b, temperature=0.8)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("chunk", [1, 11 * 3, 11 * 63, 2**22])
def test_chunk_size_changes_nothing_but_rounding(monkeypatch, chunk):
    hidden, weight, bias, targets = make(63, 11)
    coefficients = torch.randn(2, 63, generator=torch.Generator().manual_seed(1))

    def run():
        function = lambda h, w, b: linear_logprob(h, w, targets, bias=b, temperature=0.7)  # noqa: E731
        return [*function(hidden, weight, bias), *gradients(function, (hidden, weight, bias), coefficients)]

    want = run()
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    for got, whole in zip(run(), want, strict=True):
        assert_close(got, whole, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1000)  # a row a chunk: sums over chunks stay in float32 too
    hidden, weight, bias, targets = make(63, 1000, dtype=dtype)
    coefficients = torch.randn(2, 63, generator=torch.Generator().manual_seed(1))
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias)
    want = dense(hidden, weight, bias, targets, 1.0)
    assert logprob.dtype == entropy.dtype == torch.float32
    # The inputs are exactly representable in float32: what is left is float32 error, far below a bfloat16 step.
    assert_close(logprob, want[0], 1e-6)
    assert_close(entropy, want[1], 3e-6)
    got = gradients(lambda h, w, b: linear_logprob(h, w, targets, bias=b), (hidden, weight, bias), coefficients)
    want = gradients(
        lambda h, w, b: dense(h, w, b, targets, 1.0), (hidden.double(), weight.double(), bias.double()), coefficients
    )
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, torch.finfo(dtype).eps)


def test_mixed_dtypes_and_int32_targets():
    hidden, weight, _, targets = make(9, 11, bias=False)
    got = linear_logprob(hidden, weight.bfloat16(), targets.int())
    for ours, theirs in zip(got, dense(hidden, weight.bfloat16(), None, targets, 1.0), strict=True):
        assert_close(ours, theirs, 3e-6)


def test_autocast_does_not_lower_the_precision():
    hidden, weight, bias, targets = make(63, 1000)
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, entropy = linear_logprob(leaf, weight, targets, bias=bias)
        (logprob + entropy).sum().backward()
    plain = linear_logprob(hidden, weight, targets, bias=bias)
    assert torch.equal(logprob, plain[0])
    assert torch.equal(entropy, plain[1])
    (want,) = gradients(lambda h: dense(h, weight, bias, targets, 1.0), (hidden.double(),), torch.ones(2, 63))
    assert_close(leaf.grad, want, 5e-6)


def test_large_logits_stay_accurate():
    hidden, weight, _, targets = make(63, 1000, bias=False)
    hidden = hidden * 200
    logprob, entropy = linear_logprob(hidden, weight, targets)
    want = dense(hidden, weight, None, targets, 1.0)
    assert_close(logprob, want[0], 1e-6)
    # Logits of hundreds carry absolute float32 errors of 1e-5; the entropy may not add to them.
    assert (entropy - want[1]).abs().max() < 2e-4
    assert (entropy >= 0).all()


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_only_where_required(needed):
    hidden, weight, bias, targets = make(5, 11)
    leaves = [x.requires_grad_(need) for x, need in zip((hidden, weight, bias), needed, strict=True)]
    linear_logprob(hidden, weight, targets, bias=bias)[0].sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needed)


def test_no_rows_still_has_a_graph():
    hidden, weight, bias, targets = make(0, 11)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias)
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_second_derivative_is_refused():
    hidden, weight, _, targets = make(3, 11, bias=False)
    hidden.requires_grad_()
    scale = torch.ones(3, requires_grad=True)
    loss = (scale * linear_logprob(hidden, weight, targets)[0]).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class LargestAllocation(TorchDispatchMode):
    """Records the largest storage, in elements, that any operation makes (views and given tensors do not count)."""

    def __init__(self, *given):
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(("n", "v", "d", "budget"), [(100, 50257, 16, 2**18), (500, 1000, 8, 6000)])
def test_never_holds_the_logits_nor_an_unneeded_weight_gradient(monkeypatch, n, v, d, budget):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", budget)
    hidden, weight, _, targets = make(n, v, d, bias=False)
    hidden.requires_grad_()
    saved = []
    with LargestAllocation(hidden, weight, targets) as recorder:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t)
        with hooks:
            logprob, entropy = linear_logprob(hidden, weight, targets)
        (logprob + entropy).sum().backward()
    # It did see the chunks, and the budget tells logits and weight gradient apart from them.
    assert budget / 2 < recorder.elements <= budget < min(n * v, v * d)
    assert max(saved) <= v * d  # the weight itself


def test_recorder_would_see_dense_logits():
    hidden, weight, _, targets = make(100, 1000, bias=False)
    with LargestAllocation(hidden, weight, targets) as recorder:
        dense(hidden, weight, None, targets, 1.0)
    assert recorder.elements >= 100 * 1000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden must have shape \[N, D\], got \[4\]"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.long)}, TypeError, "hidden must have a floating-point dtype"),
        ({"weight": torch.zeros(11, 9)}, ValueError, r"weight must have shape \[V, D=8\], got \[11, 9\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "weight must have at least one row"),
        ({"weight": torch.zeros(11, 8, device="meta")}, ValueError, "weight is on meta, .* on cpu"),
        ({"bias": torch.zeros(10)}, ValueError, r"bias must have shape \[V=11\], got \[10\]"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, ValueError, r"targets must have shape \[N=3\], got \[2\]"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must have an int32 or int64 dtype, got torch.float32"),
        ({"targets": torch.tensor([0, 11, 2])}, ValueError, r"targets must lie in \[0, 11\), got 11"),
        ({"targets": torch.tensor([0, -1, 11])}, ValueError, r"targets must lie in \[0, 11\), got -1"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number > 0, got nan"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', 'reference', 'triton', got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    hidden, weight, bias, targets = make(3, 11)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets} | change
    with pytest.raises(error, match=message):
        linear_logprob(**arguments)
