"""policy_loss, the Triton kernel, against the oracle, the float64 reference and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from retrain_kernels.policy_loss import AGGREGATIONS, KINDS, KL_ESTIMATORS, kernel, policy_loss, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULP = torch.finfo(torch.float32).eps
NAMES = ("logprob", "old_logprob", "advantages", "ref_logprob", "entropy", "weights")
PPO = {"kind": "ppo", "aggregation": "token_mean", "clip_low": 0.2, "clip_high": 0.28}


def tensor(values, **kw):
    return torch.tensor(values, device=DEVICE, **kw)


def cu_of(lengths, dtype=torch.int32):
    return tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def batch_of(lengths, seed=0, spread=0.4, dtype=torch.float32):
    """The six vectors [N], by name; log-ratios are about `spread`."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(sum(lengths), generator=g, dtype=torch.float64)  # noqa: E731
    new = -draw().abs() - 0.1
    values = (new, new + spread * draw(), draw(), new + draw(), draw().abs(), draw().abs() * (draw() > -0.5))
    return {name: value.to(DEVICE, dtype) for name, value in zip(NAMES, values, strict=True)}


def options_of(kind="ppo", aggregation="token_mean", denominator=None, *, clip=(0.2, 0.28), dual_clip=0.0, **options):
    """Keywords of reference.policy_loss and kernel.policy_loss."""
    if denominator is None and aggregation == "constant":
        denominator = 7
    return {
        "objective": reference.Objective(kind, *clip, dual_clip),
        "aggregation": aggregation,
        "denominator": denominator,
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "entropy_coef": 0.05,
    } | options


def evaluate(compute, batch, cu_seqlens, options, dtype=None):
    """Loss, metrics and the gradients to logprob and entropy (None where there is none) by name, in float64."""
    batch = {name: None if x is None else x.detach().to(dtype or x.dtype).clone() for name, x in batch.items()}
    leaves = {f"{n}_grad": batch[n].requires_grad_() for n in ("logprob", "entropy") if batch[n] is not None}
    loss, metrics = compute(
        *(batch[name] for name in NAMES[:3]), cu_seqlens, **{name: batch[name] for name in NAMES[3:]}, **options
    )
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert all(gradient.dtype == leaves[name].dtype for name, gradient in gradients.items())
    return {name: value.detach().double() for name, value in ({"loss": loss} | metrics | gradients).items()}


def rms(x):
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def check(batch, cu_seqlens, options, *, block=kernel.BLOCK, signal=False):
    """The bar, for every result: error at most twice that of torch in the same dtype, plus 4 ulp of its terms.

    signal: the bar itself has to lie far below the result. Returns the kernel's results and the terms' magnitudes.
    """
    exact = evaluate(reference.policy_loss, batch, cu_seqlens, options, torch.float64)
    torchs = evaluate(reference.policy_loss, batch, cu_seqlens, options)
    got = evaluate(kernel.policy_loss, batch, cu_seqlens, options | {"block": block})
    magnitude = exact | magnitudes(batch, cu_seqlens, options)
    assert set(got) == set(torchs)
    for name, want in exact.items():
        assert got[name].isfinite().all(), name
        error, bar = rms(got[name] - want), 2 * rms(torchs[name] - want) + 4 * ULP * rms(magnitude[name])
        assert error <= bar, f"{name}: error {error:.3g}, bar {bar:.3g}"
        assert not signal or bar <= 0.01 * rms(want), f"{name}: bar {bar:.3g} beside {rms(want):.3g}"
    return got, magnitude


def magnitudes(batch, cu_seqlens, options):
    """Sums of absolute terms, in float64, of the results whose terms may cancel.

    exp turns the rounding of its argument into a relative error as large as the argument: `steepness`.
    """
    new, old, ref = (None if batch[n] is None else batch[n].double() for n in ("logprob", "old_logprob", "ref_logprob"))
    gaps = [(new - other).clamp(-20, 20).abs() for other in (old, ref) if other is not None]
    steepness = 1 + max((gap.max().item() for gap in gaps if gap.numel()), default=0.0)
    advantages, surrogate = batch["advantages"], options | {"kl_coef": 0.0, "entropy_coef": 0.0}
    parts = [(advantages.clamp(min=0), surrogate), (advantages.clamp(max=0), surrogate), (advantages * 0, options)]
    results = [
        evaluate(reference.policy_loss, batch | {"advantages": part}, cu_seqlens, of, torch.float64)
        for part, of in parts
    ]
    terms = {name: steepness * sum(r[name].abs() for r in results) for name in ("loss", "logprob_grad", "ratio_sum")}
    terms["kl_sum"] = gaps[0].sum()
    if ref is not None and options["kl_estimator"] == "k1":
        terms["ref_kl_sum"] = gaps[1].sum()
    return terms


# ---- the oracle and the float64 reference -------------------------------------------------------------------------


@settings(max_examples=70, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=5),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(sorted(KINDS)),
    aggregation=st.sampled_from(AGGREGATIONS),
    denominator=st.none() | st.integers(1, 100),
    kl_estimator=st.sampled_from(sorted(KL_ESTIMATORS)),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.05, -0.05]),
    absent=st.sets(st.sampled_from(NAMES[3:])),
    dual=st.booleans(),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
    block=st.sampled_from([4, 16, 64]),
)
def test_ragged_batches_match_the_oracle_and_the_reference(
    lengths, seed, kind, aggregation, denominator, kl_estimator, kl_coef, entropy_coef, absent, dual, spread, block
):
    batch = batch_of(lengths, seed, spread) | dict.fromkeys(absent)
    dual_clip = 2.0 if dual and kind == "ppo" else 0.0
    terms = {
        "kl_estimator": kl_estimator,
        "kl_coef": 0.0 if "ref_logprob" in absent else kl_coef,
        "entropy_coef": 0.0 if "entropy" in absent else entropy_coef,
    }
    options = options_of(kind, aggregation, denominator, dual_clip=dual_clip, **terms)
    got, magnitude = check(batch, cu_of(lengths), options, block=block)

    rows = [None if x is None else [row.tolist() for row in x.split(lengths)] for x in batch.values()]
    optional = dict(zip(("ref", "entropy", "weights"), rows[3:], strict=True))
    if rows[0]:
        want = oracle.policy_loss(
            *rows[:3], kind=kind, aggregation=aggregation, denominator=options["denominator"], dual_clip=dual_clip,
            **optional, **terms,
        )  # fmt: skip
        assert abs(got["loss"].item() - want) <= 16 * ULP * magnitude["loss"].item()
    assert got["tokens"] == sum(lengths)


AWKWARD = [1, 63, 0, 500, 1000, 4097]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    ("aggregation", "kl_estimator"), [("token_mean", "k3"), ("seq_mean", "k1"), ("constant", "k2")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_beside_torch_in_the_same_dtype(kind, aggregation, kl_estimator, dtype):
    batch = batch_of(AWKWARD, seed=3, spread=0.5, dtype=dtype)
    clip = (3e-4, 4e-4) if kind == "gspo" else (0.2, 0.28)
    dual_clip = 1.5 if kind == "ppo" else 0.0
    options = options_of(kind, aggregation, clip=clip, dual_clip=dual_clip, kl_estimator=kl_estimator)
    check(batch, cu_of(AWKWARD, torch.int64), options, signal=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.03, 0.12, 0.23, 0.37, 0.71, 0.97, 1.01, 3.1, 19.7])
def test_k3_keeps_its_digits_at_every_gap(gap, sign):
    """Relative to itself, not to 1: exp(d) - 1 - d in float32 is pure noise at 1e-3."""
    ref = tensor([sign * gap])
    batch = dict.fromkeys(NAMES) | dict.fromkeys(NAMES[:3], 0 * ref) | {"ref_logprob": ref}
    got = evaluate(kernel.policy_loss, batch, cu_of([1]), options_of(kl_coef=1.0, entropy_coef=0.0))
    d = ref.item()
    want = math.fsum(d**k / math.factorial(k) for k in range(2, 40)) if gap < 1 else math.expm1(d) - d
    # exp turns the rounding of a large gap into a relative error.
    assert got["ref_kl_sum"].item() == pytest.approx(want, rel=6 * ULP * max(1, gap), abs=0.0)
    assert got["logprob_grad"].item() == pytest.approx(-math.expm1(d), rel=6 * ULP * max(1, gap), abs=0.0)


@pytest.mark.parametrize(
    ("aggregation", "denominator", "want"),
    [("token_mean", None, 0.5), ("token_mean", 8, 0.5), ("seq_mean", None, 0.0), ("constant", 2 * 4, 0.5)],
)
@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "gspo"])
def test_on_policy_check_values(kind, aggregation, denominator, want):
    logprob, advantages = tensor([-1.0, -2.0] + [-0.5] * 6), tensor([1.0] * 2 + [-1.0] * 6)
    options = PPO | {"kind": kind, "aggregation": aggregation, "denominator": denominator}
    loss, metrics = policy_loss(logprob, logprob, advantages, cu_of([2, 6]), impl="triton", **options)
    assert loss.item() == pytest.approx(want, abs=2 * ULP)
    assert {n: m.item() for n, m in metrics.items()} == {"tokens": 8, "ratio_sum": 8, "clipped_sum": 0, "kl_sum": 0}


# ---- clamps and ties ----------------------------------------------------------------------------------------------


def single_tokens(kind, log_ratios, advantages, clip=(0.2, 0.28), **options):
    """Each token its own completion, summed: gradients [n] and metrics of the kernel, equal to the reference's."""
    new = tensor(log_ratios)
    batch = dict.fromkeys(NAMES) | {"logprob": new, "old_logprob": 0 * new, "advantages": tensor(advantages)}
    options = options_of(kind, "constant", 1, clip=clip, kl_coef=0.0, entropy_coef=0.0) | options
    cu_seqlens = cu_of([1] * len(new))
    got, want = (evaluate(op.policy_loss, batch, cu_seqlens, options) for op in (kernel, reference))
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=0.0)
    return got


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_log_ratios_are_clamped_and_move_up_to_the_bound(kind):
    beyond = math.nextafter(20.0, 21.0)
    log_ratios = [20.0, -20.0, 20.0 + 2e-6, -20.0 - 2e-6, 100.0, -100.0, beyond]
    for advantage in (1.0, -1.0):
        got = single_tokens(kind, log_ratios, [advantage] * 7, clip=(1.0, 1e9))
        moves = got["logprob_grad"] != 0
        assert moves.tolist() == ([True] * 7 if kind == "cispo" else [True, True, False, False, False, False, True])
        assert got["kl_sum"].item() == -20.0


@pytest.mark.parametrize("kind", ["ppo", "cispo", "gspo"])
@pytest.mark.parametrize("clip", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)])
def test_a_ratio_of_one_at_its_bound_is_not_clipped(kind, clip):
    got = single_tokens(kind, [0.0] * 5, [1.5, -2.0, 0.0, -0.0, 1e-40], clip=clip)
    assert got["clipped_sum"] == 0
    assert got["logprob_grad"].tolist() == pytest.approx([-1.5, 2.0, 0.0, 0.0, -1e-40], rel=1e-4)


@pytest.mark.parametrize("kind", ["ppo", "cispo", "gspo"])
@pytest.mark.parametrize("log_ratio", [0.25, 1.3, -0.4])
def test_a_ratio_at_its_bound_and_a_step_beyond_it(kind, log_ratio):
    """The bound is set from the kernel's own exp, to the bit; README: the bounds belong to the interval."""
    batch = dict.fromkeys(NAMES) | {"logprob": tensor([log_ratio]), "old_logprob": tensor([0.0])}
    batch["advantages"] = tensor([1.0 if log_ratio > 0 else -1.0])
    free = {"kl_coef": 0.0, "entropy_coef": 0.0}
    ratio = evaluate(kernel.policy_loss, batch, cu_of([1]), options_of(kind, **free))["ratio_sum"].item()
    inward = torch.nextafter(torch.tensor(ratio, dtype=torch.float32), torch.tensor(1.0)).item()
    for bound, clipped in ((ratio, 0), (inward, 1)):
        clip = (0.9, bound - 1) if log_ratio > 0 else (1 - bound, 0.9)
        got = evaluate(kernel.policy_loss, batch, cu_of([1]), options_of(kind, clip=clip, **free))
        assert got["clipped_sum"] == clipped
        if kind != "cispo":
            assert got["logprob_grad"].abs().item() == (0.0 if clipped else ratio)


def test_where_free_and_clipped_terms_round_to_one_number_each_has_half():
    """A subnormal advantage cannot tell a ratio of 1.25 from its bound; the reference's maximum then takes half."""
    tiny = 2.0**-149
    got = single_tokens("ppo", [math.log(1.25)] * 2, [tiny * 2, 1.0], clip=(0.2, 0.2))
    assert got["logprob_grad"].tolist() == [-tiny, 0.0]
    assert got["clipped_sum"] == 1


@pytest.mark.parametrize("advantage", [0.0, -0.0])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_zero_advantage_moves_nothing(kind, advantage):
    got = single_tokens(kind, [0.0, 3.0, -3.0, 50.0], [advantage] * 4)
    assert got["loss"] == 0
    assert not got["logprob_grad"].any()
    assert got["clipped_sum"] == (3 if kind == "cispo" else 0)


def test_dual_clip_at_and_above_its_bound():
    got = single_tokens("ppo", [0.0, math.log(2.0), 3.0, 3.0, -3.0], [-1.0, -1.0, -1.0, 1.0, -1.0],
                        objective=reference.Objective("ppo", 0.2, 0.28, 3.0))  # fmt: skip
    assert got["logprob_grad"].tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0, 0.0], rel=1e-6)
    assert got["clipped_sum"] == 3


@pytest.mark.parametrize("estimator", sorted(KL_ESTIMATORS))
def test_the_gap_to_the_reference_policy_is_clamped(estimator):
    gaps = [20.0, -20.0, 20.5, -20.5, 300.0, 0.0]
    ref = {"kl_coef": 0.5, "kl_estimator": estimator}
    batch = dict.fromkeys(NAMES) | {name: tensor([0.0] * 6) for name in NAMES[:3]} | {"ref_logprob": tensor(gaps)}
    options = options_of(aggregation="constant", denominator=1, entropy_coef=0.0, **ref)
    got, want = (evaluate(op.policy_loss, batch, cu_of([6]), options) for op in (kernel, reference))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=0.0)
    assert (got["logprob_grad"][2:5] == 0).all()


@pytest.mark.parametrize("poisoned", NAMES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nan_is_not_hidden_by_a_clamp(kind, poisoned):
    batch = batch_of([5, 3])
    batch[poisoned][2] = math.nan
    got = evaluate(kernel.policy_loss, batch, cu_of([5, 3]), options_of(kind, "seq_mean") | {"block": 4})
    assert got["loss"].isnan()
    assert got["logprob_grad"][5:].isfinite().all()


@pytest.mark.parametrize("log_ratio", [0.5, -0.5])
def test_gspo_loses_no_nan_advantage_to_its_clipping(log_ratio):
    new = tensor([log_ratio] * 3)
    batch = dict.fromkeys(NAMES) | {"logprob": new, "old_logprob": 0 * new, "advantages": tensor([1.0, math.nan, -1.0])}
    got = evaluate(kernel.policy_loss, batch, cu_of([3]), options_of("gspo", kl_coef=0.0, entropy_coef=0.0))
    assert got["loss"].isnan()
    assert got["logprob_grad"].isnan().all()


# ---- no tokens, odd layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_give_zero_with_a_graph(kind, aggregation, lengths):
    got = evaluate(kernel.policy_loss, batch_of(lengths), cu_of(lengths), options_of(kind, aggregation))
    assert {name for name, value in got.items() if value.shape == (0,)} == {"logprob_grad", "entropy_grad"}
    assert all(value == 0 for value in got.values() if value.ndim == 0)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_completions_between_others(kind, aggregation):
    lengths = [0, 3, 0, 0, 9, 0]
    check(batch_of(lengths), cu_of(lengths), options_of(kind, aggregation), block=4)


def test_vectors_with_strides():
    lengths = [5, 40, 3]
    dense = batch_of(lengths)
    wide = {name: torch.stack([x, x * math.nan], dim=1)[:, 0] for name, x in dense.items()}
    wide["weights"] = dense["weights"] = tensor(0.5).expand(sum(lengths))
    cu_seqlens = torch.stack([cu_of(lengths), cu_of(lengths) - 1], dim=1)[:, 0]
    assert not any(x.is_contiguous() for x in (*wide.values(), cu_seqlens))
    results = []
    for batch, cu in ((dense, cu_of(lengths)), (wide, cu_seqlens)):
        leaf = batch["logprob"].detach().requires_grad_()
        entropy = batch["entropy"].detach().requires_grad_()
        loss, metrics = kernel.policy_loss(
            leaf, batch["old_logprob"], batch["advantages"], cu, ref_logprob=batch["ref_logprob"], entropy=entropy,
            weights=batch["weights"], **options_of(aggregation="seq_mean"),
        )  # fmt: skip
        results.append((loss, *metrics.values(), *torch.autograd.grad(loss, (leaf, entropy))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_each_vector_may_have_its_own_dtype():
    batch = batch_of([5, 40, 3])
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bfloat16, torch.float64)
    mixed = {name: x.to(dtype) for (name, x), dtype in zip(batch.items(), dtypes, strict=True)}
    check(mixed, cu_of([5, 40, 3]), options_of())


# ---- autograd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_to_entropy_alone(aggregation, weighted):
    lengths, g = [3, 0, 4, 1], []
    batch = batch_of(lengths) | ({} if weighted else {"weights": None})
    for compute in (kernel.policy_loss, reference.policy_loss):
        entropy = batch["entropy"].clone().requires_grad_()
        optional = {name: batch[name] for name in ("ref_logprob", "weights")} | {"entropy": entropy}
        loss, _ = compute(*(batch[n] for n in NAMES[:3]), cu_of(lengths), **optional, **options_of("ppo", aggregation))
        g.append(torch.autograd.grad(2.5 * loss, entropy)[0])
    torch.testing.assert_close(*g, rtol=4 * ULP, atol=0.0)


def test_everything_else_is_a_constant():
    leaves = {name: x.requires_grad_() for name, x in batch_of([4, 2]).items()}
    optional = {name: leaves[name] for name in NAMES[3:]} | {"kl_coef": 0.1}
    constants = [leaves[name] for name in NAMES[1:3]]
    loss, metrics = policy_loss(leaves["logprob"], *constants, cu_of([4, 2]), **optional, impl="triton", **PPO)
    loss.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"logprob"}
    assert not any(value.requires_grad for value in metrics.values())
    assert all(value.shape == () and value.dtype == torch.float32 for value in (loss, *metrics.values()))
    frozen = leaves["logprob"].detach()
    assert not policy_loss(frozen, *constants, cu_of([4, 2]), **optional, impl="triton", **PPO)[0].requires_grad


def test_backward_scales_and_may_be_repeated_but_not_differentiated():
    batch = batch_of([5, 3])
    leaf = batch["logprob"].clone().requires_grad_()
    loss, _ = policy_loss(leaf, batch["old_logprob"], batch["advantages"], cu_of([5, 3]), impl="triton", **PPO)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    torch.testing.assert_close(thrice, 3 * once, rtol=2 * ULP, atol=0.0)
    incoming = tensor(1.0, requires_grad=True)
    (graphed,) = torch.autograd.grad(loss, leaf, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        graphed.sum().backward()


def test_one_number_a_token_is_kept_for_backward_and_none_without_a_graph(monkeypatch):
    lengths = [40, 24]
    batch = {name: x.requires_grad_() for name, x in batch_of(lengths).items()} | {"weights": None}
    sizes, saved = [], []
    new_empty = torch.Tensor.new_empty

    def recording(like, size, **kw):
        sizes.append(size)
        return new_empty(like, size, **kw)

    monkeypatch.setattr(torch.Tensor, "new_empty", recording)
    vectors = [batch[name] for name in NAMES[:3]]
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        policy_loss(*vectors, cu_of(lengths), entropy=batch["entropy"], entropy_coef=0.1, impl="triton", **PPO)
    assert sum(x.numel() for x in saved) == sum(lengths)
    # The interpreter takes empty tensors of its own.
    assert [size for size in sizes if size != 0] == [(2, 6), sum(lengths)]
    sizes.clear()
    with torch.no_grad():
        loss, _ = policy_loss(*vectors, cu_of(lengths), impl="triton", **PPO)
    assert not loss.requires_grad
    assert [size for size in sizes if size != 0] == [(2, 5)]


def test_the_device_is_waited_for_once():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    batch = batch_of([5, 3])
    leaf, entropy = (batch[name].requires_grad_() for name in ("logprob", "entropy"))
    with Reads() as reads:
        loss, _ = policy_loss(
            leaf, batch["old_logprob"], batch["advantages"], cu_of([5, 3]), entropy=entropy, entropy_coef=0.1,
            weights=batch["weights"], impl="triton", **PPO | {"aggregation": "seq_mean"},
        )  # fmt: skip
        loss.backward()
    assert reads.count == 1


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logprob": torch.zeros(4, dtype=torch.float64)}, RuntimeError, '"triton" cannot run: .* a tensor is float64'),
        ({"old_logprob": torch.zeros(3)}, ValueError, r"old_logprob must have shape \[N=4\], got \[3\]"),
        ({"advantages": torch.zeros(4).long()}, TypeError, "advantages must have a floating-point dtype"),
        ({"weights": torch.zeros(4, device="meta")}, ValueError, "weights is on meta, but the other tensors are on"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, r"cu_seqlens must start at 0, never decrease"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"cu_seqlens must start at 0, .*\(4\), got \[0, 2\]"),
        ({"kind": "grpo"}, ValueError, "kind must be one of"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprob is required where kl_coef is not 0"),
        ({"entropy_coef": 0.1}, ValueError, "entropy is required where entropy_coef is not 0"),
        ({"aggregation": "constant"}, ValueError, "denominator is required"),
    ],
)
def test_wrong_arguments_are_named_before_any_launch(change, error, message, monkeypatch):
    arguments = {name: torch.zeros(4) for name in NAMES[:3]} | {"cu_seqlens": torch.tensor([0, 2, 4])} | PPO | change
    arguments = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
                 for name, x in arguments.items()}  # fmt: skip
    monkeypatch.setattr(kernel, "policy_loss_kernel", None)
    with pytest.raises(error, match=message):
        policy_loss(**arguments, impl="triton")
