"""policy_loss: check values, a loop oracle, numerical gradients, and invariance to how a batch is cut or ordered."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import retrain_kernels
from retrain_kernels import policy_loss
from retrain_kernels.policy_loss import AGGREGATIONS, KINDS, KL_ESTIMATORS

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def pack(rows, dtype=torch.float64):
    return torch.tensor([x for row in rows for x in row], dtype=dtype)


def cu_of(rows):
    return torch.tensor([0, *itertools.accumulate(len(row) for row in rows)], dtype=torch.int32)


def ragged_batch(lengths, seed=0, spread=0.4):
    """Lists of (logprob, old, advantages, ref, entropy, weights), one inner list a completion."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    names = ("logprob", "old", "advantages", "ref", "entropy", "weights")
    batch = {name: [] for name in names}
    for n in lengths:
        new = -draw(n).abs() - 0.1
        batch["logprob"].append(new.tolist())
        batch["old"].append((new + spread * draw(n)).tolist())
        batch["advantages"].append(draw(n).tolist())
        batch["ref"].append((new + draw(n)).tolist())
        batch["entropy"].append(draw(n).abs().tolist())
        batch["weights"].append((draw(n).abs() * (draw(n) > -0.5)).tolist())
    return batch


def run(batch, *, leaf=None, dtype=torch.float64, extras=(), **options):
    """policy_loss on ragged lists; `leaf` replaces the packed log-probs."""
    keyword = {"ref": "ref_logprob"}
    tensors = {keyword.get(name, name): pack(batch[name], dtype) for name in extras}
    return policy_loss(
        pack(batch["logprob"], dtype) if leaf is None else leaf,
        pack(batch["old"], dtype),
        pack(batch["advantages"], dtype),
        cu_of(batch["logprob"]),
        **tensors,
        **({"kind": "ppo", "aggregation": "token_mean"} | CLIP | options),
    )


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "gspo"])
@pytest.mark.parametrize(
    ("aggregation", "denominator", "want"),
    [("token_mean", None, 0.5), ("token_mean", 8, 0.5), ("seq_mean", None, 0.0), ("constant", 2 * 4, 0.5)],
)
def test_on_policy_check_values(kind, aggregation, denominator, want):
    logprob = [[-1.0, -2.0], [-0.5] * 6]
    batch = {"logprob": logprob, "old": logprob, "advantages": [[1.0] * 2, [-1.0] * 6]}
    loss, metrics = run(batch, kind=kind, aggregation=aggregation, denominator=denominator)
    assert loss.item() == pytest.approx(want, abs=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == {
        "tokens": 8, "ratio_sum": 8, "clipped_sum": 0, "kl_sum": 0,
    }  # fmt: skip


def test_ppo_clips_by_the_sign_of_the_advantage():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.27], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    leaf = ratios.log().requires_grad_()
    options = {"kind": "ppo", "aggregation": "constant", "denominator": 1} | CLIP
    loss, metrics = policy_loss(leaf, torch.zeros_like(ratios), advantages, torch.tensor([0, 5]), **options)
    assert loss.item() == pytest.approx(-1.28 + 1.5 - 0.5 + 0.8 - 1.27)
    loss.backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([0.0, 1.5, -0.5, 0.0, -1.27], dtype=torch.float64))
    assert metrics["clipped_sum"].item() == 2
    assert metrics["ratio_sum"].item() == pytest.approx(ratios.sum().item())
    assert metrics["kl_sum"].item() == pytest.approx(-ratios.log().sum().item())


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    leaf = torch.tensor([4.0, 2.0, 4.0], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    loss, metrics = policy_loss(
        leaf, torch.zeros(3, dtype=torch.float64), advantages, torch.tensor([0, 3]),
        kind="ppo", aggregation="constant", denominator=1, dual_clip=3.0, **CLIP,
    )  # fmt: skip
    assert loss.item() == pytest.approx(3.0 + 2.0 - 1.28)
    loss.backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))
    assert metrics["clipped_sum"].item() == 2


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    ratios = torch.tensor([1.5, 0.5, 1.1], dtype=torch.float64)
    leaf = ratios.log().requires_grad_()
    advantages = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    loss, metrics = policy_loss(
        leaf, torch.zeros(3, dtype=torch.float64), advantages, torch.tensor([0, 3]),
        kind="cispo", aggregation="token_mean", **CLIP,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(leaf.grad, -torch.tensor([1.28, 0.8, 1.1]).double() * advantages / 3)
    assert metrics["clipped_sum"].item() == 2


def test_gspo_is_the_sequence_objective_under_seq_mean():
    batch = ragged_batch([3, 5, 1], spread=2e-4)
    batch["advantages"] = [[a] * n for a, n in zip([1.0, -0.5, 2.0], [3, 5, 1], strict=True)]
    loss, metrics = run(batch, kind="gspo", aggregation="seq_mean", clip_low=3e-4, clip_high=4e-4)
    objectives, ratios = [], []
    for new, old, a in zip(batch["logprob"], batch["old"], [1.0, -0.5, 2.0], strict=True):
        s = math.exp(sum(n - o for n, o in zip(new, old, strict=True)) / len(new))
        ratios += [s] * len(new)
        objectives.append(min(s * a, min(max(s, 1 - 3e-4), 1 + 4e-4) * a))
    assert loss.item() == pytest.approx(-sum(objectives) / 3, rel=1e-12)
    assert metrics["ratio_sum"].item() == pytest.approx(sum(ratios), rel=1e-12)


def test_log_ratios_are_clamped():
    for sign in (1, -1):
        loss, metrics = policy_loss(
            torch.tensor([sign * 100.0]), torch.zeros(1), torch.ones(1), torch.tensor([0, 1]),
            kind="importance_sampling", aggregation="token_mean", ref_logprob=torch.tensor([sign * 200.0]), **CLIP,
        )  # fmt: skip
        assert loss.item() == pytest.approx(-math.exp(sign * 20), rel=1e-6)
        assert metrics["kl_sum"].item() == -sign * 20
        assert metrics["ref_kl_sum"].item() == pytest.approx(math.exp(sign * 20) - sign * 20 - 1, rel=1e-6)


@pytest.mark.parametrize(("estimator", "want"), [("k1", -0.3), ("k2", 0.045), ("k3", math.exp(0.3) - 1.3)])
def test_kl_estimators(estimator, want):
    loss, metrics = policy_loss(
        pack([[-1.3]]), pack([[-1.3]]), torch.zeros(1), torch.tensor([0, 1]),
        kind="ppo", aggregation="token_mean", ref_logprob=pack([[-1.0]]), kl_coef=0.5,
        kl_estimator=estimator, **CLIP,
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.5 * want, rel=1e-12)
    assert metrics["ref_kl_sum"].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("estimator", "sign"), [("k1", None), ("k2", 1), ("k3", 1)])
def test_expected_kl_over_a_categorical_policy(estimator, sign):
    """k1 and k3 are unbiased for KL(policy || reference), and the gradients of k2 and k3 as losses point down it."""
    logits = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64), 0)
    log_p = torch.log_softmax(logits, 0)
    p = log_p.detach().exp()
    kl = (log_p.exp() * (log_p - ref)).sum()
    (want,) = torch.autograd.grad(kl, logits, retain_graph=True)
    loss, _ = policy_loss(
        log_p, log_p.detach(), torch.zeros(3), torch.tensor([0, 3]), kind="ppo", aggregation="constant",
        denominator=1, ref_logprob=ref, kl_coef=1.0, kl_estimator=estimator, weights=p, **CLIP,
    )  # fmt: skip
    if estimator != "k2":
        assert loss.item() == pytest.approx(kl.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    if sign is None:
        assert grad.abs().max().item() < 1e-15  # README: k1 as a loss measures and does not bound
    else:
        assert torch.dot(grad, want) > 0


# ---- the oracle ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(sorted(KINDS)),
    aggregation=st.sampled_from(AGGREGATIONS),
    denominator=st.none() | st.integers(1, 100),
    kl_estimator=st.sampled_from(sorted(KL_ESTIMATORS)),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.05, -0.05]),
    weighted=st.booleans(),
    dual=st.booleans(),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_matches_the_oracle(
    lengths, seed, kind, aggregation, denominator, kl_estimator, kl_coef, entropy_coef, weighted, dual, spread
):
    batch = ragged_batch(lengths, seed, spread)
    options = {
        "kind": kind,
        "aggregation": aggregation,
        "denominator": 7 if denominator is None and aggregation == "constant" else denominator,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "entropy_coef": entropy_coef,
        "dual_clip": 2.0 if dual and kind == "ppo" else 0.0,
    }
    extras = ["ref", "entropy"] + ["weights"] * weighted
    want = oracle.policy_loss(
        *(batch[name] for name in ("logprob", "old", "advantages")), **{e: batch[e] for e in extras}, **options
    )
    loss, metrics = run(batch, extras=extras, **options)
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert metrics["tokens"].item() == sum(lengths)
    assert metrics["entropy_sum"].item() == pytest.approx(sum(map(sum, batch["entropy"])), rel=1e-9, abs=1e-12)
    single, _ = run(batch, extras=extras, dtype=torch.float32, **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(want, rel=1e-3, abs=1e-4 * (1 + sum(lengths)) * math.exp(min(spread * 2, 9)))


# ---- gradients ----------------------------------------------------------------------------------------------------


# cispo stops gradients by definition: its closed form stands above.
@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "gspo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_estimator", sorted(KL_ESTIMATORS))
def test_gradcheck_through_logprob_and_entropy(kind, aggregation, kl_estimator):
    batch = ragged_batch([3, 0, 4, 1])

    def loss(logprob, entropy):
        return policy_loss(
            logprob, pack(batch["old"]), pack(batch["advantages"]), cu_of(batch["logprob"]), kind=kind,
            aggregation=aggregation, denominator=11, ref_logprob=pack(batch["ref"]), kl_coef=0.3,
            kl_estimator=kl_estimator, entropy=entropy, entropy_coef=0.2, weights=pack(batch["weights"]), **CLIP,
        )[0]  # fmt: skip

    inputs = [pack(batch[name]).requires_grad_() for name in ("logprob", "entropy")]
    assert torch.autograd.gradcheck(loss, inputs)


def test_everything_else_is_a_constant():
    batch = ragged_batch([4, 2])
    leaves = {n: pack(batch[n]).requires_grad_() for n in ("logprob", "old", "advantages", "ref", "weights", "entropy")}
    loss, metrics = policy_loss(
        leaves["logprob"], leaves["old"], leaves["advantages"], torch.tensor([0, 4, 6]), kind="ppo",
        aggregation="token_mean", ref_logprob=leaves["ref"], kl_coef=0.1, entropy=leaves["entropy"],
        weights=leaves["weights"], **CLIP,
    )  # fmt: skip
    loss.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"logprob"}
    assert not any(value.requires_grad for value in metrics.values())
    assert all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cu", [[0], [0, 0, 0]])
def test_no_tokens_give_zero_with_a_graph(kind, aggregation, cu):
    leaf = torch.zeros(0, requires_grad=True)
    denominator = 8 if aggregation == "constant" else None
    loss, metrics = policy_loss(
        leaf, torch.zeros(0), torch.zeros(0), torch.tensor(cu), kind=kind, aggregation=aggregation,
        denominator=denominator, **CLIP,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad.shape == (0,)
    assert all(value.item() == 0 for value in metrics.values())


# ---- invariance ---------------------------------------------------------------------------------------------------


def loss_and_gradients(batch, order, cuts, options):
    """Run the completions in `order`, cut into micro-batches; gradients come back in the original order."""
    lengths = [len(row) for row in batch["logprob"]]
    leaves = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in batch["logprob"]]
    total, sums = 0.0, {}
    bounds = [0, *sorted(cuts), len(order)]
    for start, stop in itertools.pairwise(bounds):
        members = order[start:stop]
        part = {name: [rows[i] for i in members] for name, rows in batch.items()}
        leaf = torch.cat([leaves[i] for i in members]) if members else torch.zeros(0, dtype=torch.float64)
        loss, metrics = run(part, leaf=leaf, extras=("ref", "entropy", "weights"), **options)
        if members:
            loss.backward()
        total += loss.item()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    gradients = [torch.zeros(n).double() if x.grad is None else x.grad for n, x in zip(lengths, leaves, strict=True)]
    return total, sums, torch.cat(gradients)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=7),
    kind=st.sampled_from(sorted(KINDS)),
    aggregation=st.sampled_from(AGGREGATIONS),
    data=st.data(),
)
def test_splitting_and_permuting_change_neither_loss_nor_gradient(lengths, kind, aggregation, data):
    batch = ragged_batch(lengths)
    denominator = {"token_mean": max(sum(lengths), 1), "seq_mean": len(lengths), "constant": len(lengths) * 8}
    options = {
        "kind": kind, "aggregation": aggregation, "denominator": denominator[aggregation], "kl_coef": 0.1,
        "entropy_coef": 0.1,
    }  # fmt: skip
    whole = loss_and_gradients(batch, list(range(len(lengths))), [], options)
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = data.draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    split = loss_and_gradients(batch, order, cuts, options)
    assert split[0] == pytest.approx(whole[0], rel=1e-12, abs=1e-12)
    assert split[1] == pytest.approx(whole[1], rel=1e-12, abs=1e-12)
    torch.testing.assert_close(split[2], whole[2], rtol=1e-12, atol=1e-12)
    if aggregation != "constant":  # the given denominator is this batch's own
        own, _ = run(batch, extras=("ref", "entropy", "weights"), **(options | {"denominator": None}))
        assert own.item() == pytest.approx(whole[0], rel=1e-12, abs=1e-12)


def test_zero_weight_and_zero_advantage_stay_in_the_denominator():
    batch = {name: [[-1.0, -1.0, -1.0, -1.0]] for name in ("logprob", "old")}
    batch |= {"advantages": [[1.0, 1.0, 0.0, 1.0]], "weights": [[1.0, 0.0, 1.0, 1.0]]}
    assert run(batch, extras=["weights"])[0].item() == pytest.approx(-0.5)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old_logprob": torch.zeros(3)}, ValueError, r"old_logprob must have shape \[N=4\], got \[3\]"),
        ({"advantages": None}, TypeError, "advantages must be a torch.Tensor, got NoneType"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"cu_seqlens must start at 0, .*\(4\), got \[0, 2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens must have an int32 or int64 dtype"),
        ({"weights": torch.ones(4, 1)}, ValueError, r"weights must have shape \[N=4\], got \[4, 1\]"),
        ({"kind": "grpo"}, ValueError, "kind must be one of importance_sampling, ppo, cispo, gspo, got 'grpo'"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of token_mean, seq_mean, constant, got 'mean'"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of k1, k2, k3, got 'k4'"),
        ({"clip_low": -0.1}, ValueError, r"clip_low must be in \[0.0, 1.0\], got -0.1"),
        ({"clip_low": 1.1}, ValueError, r"clip_low must be in \[0.0, 1.0\], got 1.1"),
        ({"clip_high": -1.0}, ValueError, "clip_high must be a finite number >= 0.0, got -1.0"),
        ({"denominator": 0}, ValueError, "denominator must be None or a finite number > 0, got 0"),
        ({"aggregation": "constant"}, ValueError, r"denominator is required .* completions \* max_tokens"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprob is required where kl_coef is not 0"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef must be a finite number >= 0.0"),
        ({"entropy_coef": 0.1}, ValueError, "entropy is required where entropy_coef is not 0"),
        ({"dual_clip": 3.0, "kind": "cispo"}, ValueError, 'dual_clip belongs to kind="ppo"'),
        ({"dual_clip": 0.5}, ValueError, r"dual_clip must be 0 \(off\) or a finite number > 1, got 0.5"),
        ({"impl": ""}, ValueError, "impl must be one of"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    zeros = torch.zeros(4)
    arguments = {
        "logprob": zeros, "old_logprob": zeros, "advantages": zeros, "cu_seqlens": torch.tensor([0, 2, 4]),
        "kind": "ppo", "aggregation": "token_mean",
    } | CLIP  # fmt: skip
    assert policy_loss(**arguments)[0].item() == 0
    with pytest.raises(error, match=message):
        policy_loss(**arguments | change)


def test_the_package_exports_the_three_operations():
    assert sorted(retrain_kernels.__all__) == ["linear_logprob", "policy_loss", "token_advantages"]
    assert all(callable(getattr(retrain_kernels, name)) for name in retrain_kernels.__all__)
