"""Episode advantages and token-level transforms: published values, exact enumeration, a loop oracle, invariants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from retrain_kernels import token_advantages
from retrain_kernels.token_advantages import ADVANTAGE_MODES, TRANSFORM_MODES, episode_advantages

GROUP_MODES = [mode for mode in ADVANTAGE_MODES if mode != "precomputed"]


def episodes(rewards, groups=None, lengths=None, *, mode):
    """episode_advantages on lists; one group of unit lengths unless told otherwise."""
    n = len(rewards)
    return episode_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups if groups is not None else [0] * n, dtype=torch.int32),
        torch.tensor(lengths if lengths is not None else [1] * n, dtype=torch.int32),
        advantage_mode=mode,
    )


def tokens(advantages, uncertainty, planning, *, transform, **strengths):
    """token_advantages on ragged lists of precomputed advantages."""
    cu = [0, *itertools.accumulate(len(u) for u in uncertainty)]
    return token_advantages(
        torch.tensor(advantages, dtype=torch.float32),
        torch.tensor([x for u in uncertainty for x in u], dtype=torch.float64),
        torch.tensor([x for p in planning for x in p], dtype=torch.bool),
        torch.tensor(cu, dtype=torch.int32),
        torch.zeros(len(advantages), dtype=torch.int32),
        advantage_mode="precomputed",
        transform_mode=transform,
        **strengths,
    )


# ---- episode advantages: published values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "size", "success", "failure"),
    [
        ("grpo", 8, 2.474874, -0.353553),
        ("maxrl", 8, 7.0, -1.0),
        ("rloo", 8, 1, -0.142857),
        ("dr_grpo", 8, 0.875, -0.125),
        ("grpo", 16, 3.75, -0.25),
        ("maxrl", 16, 15.0, -1.0),
        ("rloo", 16, 1, -0.066667),
        ("dr_grpo", 16, 0.9375, -0.0625),
    ],
)
def test_one_success_in_a_group(mode, size, success, failure):
    got = episodes([1.0] + [0.0] * (size - 1), mode=mode)
    assert got.dtype == torch.float32
    # The published values are for eps -> 0; eps = 1e-6 over a deviation of 0.25 moves them by up to 4e-6 relative.
    torch.testing.assert_close(got, torch.tensor([success] + [failure] * (size - 1)), rtol=2e-5, atol=1e-6)


def test_the_epsilons_are_the_documented_ones():
    rewards = [1.0, 0.0, 0.0, 0.0]
    assert episodes(rewards, mode="grpo")[0].item() == pytest.approx(0.75 / (0.5 + 1e-6), rel=1e-7)
    assert episodes(rewards, mode="maxrl")[0].item() == pytest.approx(0.75 / (0.25 + 1e-6), rel=1e-7)
    tiny = [3e-6, 0.0, 0.0, 0.0]  # a mean of 7.5e-7 is below the threshold of 1e-6
    assert episodes(tiny, mode="maxrl").tolist() == [0.0] * 4
    assert episodes(tiny, mode="grpo")[0].item() == pytest.approx(2.25e-6 / (1.5e-6 + 1e-6), rel=1e-5)


def test_reinforce_pp_whitens_over_tokens():
    # Centred: +.5 (3 tokens), -.5 (1 token) | uniform | -.25 (2), +.25 (2). The uniform group counts nowhere.
    rewards, groups = [1.0, 0.0, 0.7, 0.7, 0.0, 0.5], [5, 5, -2, -2, 9, 9]
    got = episodes(rewards, groups, [3, 1, 50, 50, 2, 2], mode="reinforce_pp")
    centred, weight = [0.5, -0.5, -0.25, 0.25], [3, 1, 2, 2]
    mean = 1.0 / 8
    deviation = math.sqrt(sum(w * (a - mean) ** 2 for a, w in zip(centred, weight, strict=True)) / 8)
    want = [(a - mean) / (deviation + 1e-8) for a in centred]
    torch.testing.assert_close(got, torch.tensor([want[0], want[1], 0.0, 0.0, want[2], want[3]]))
    per_token = torch.repeat_interleave(got[[0, 1, 4, 5]].double(), torch.tensor(weight))
    assert per_token.mean().item() == pytest.approx(0, abs=1e-7)
    assert per_token.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_reinforce_pp_without_spread_over_tokens_is_zero():
    assert episodes([1.0, 0.0], lengths=[0, 0], mode="reinforce_pp").tolist() == [0.0, 0.0]
    assert episodes([1.0, 0.0], lengths=[7, 0], mode="reinforce_pp").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("mode", GROUP_MODES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_uniform_groups_are_exactly_zero(mode, reward, size):
    got = episodes([reward] * size + [0.0, 1.0], [0] * size + [1, 1], [3] * (size + 2), mode=mode)
    assert got[:size].tolist() == [0.0] * size
    assert (got[size:] != 0).all()


@pytest.mark.parametrize("mode", GROUP_MODES)
def test_no_completions(mode):
    assert episodes([], mode=mode).shape == (0,)


def test_group_ids_need_no_order():
    want = episodes([1.0, 0.0, 0.0, 0.5, 0.1], [0, 0, 0, 1, 1], [1, 2, 3, 4, 5], mode="grpo")
    order = [3, 0, 4, 2, 1]
    got = episodes([0.5, 1.0, 0.1, 0.0, 0.0], [7, -3, 7, -3, -3], [4, 1, 5, 3, 2], mode="grpo")
    assert torch.equal(got, want[order])


def test_dr_grpo_is_a_fixed_share_of_rloo():
    rewards = [0.3, 0.9, 0.0, 0.25, 1.0]
    torch.testing.assert_close(episodes(rewards, mode="dr_grpo"), episodes(rewards, mode="rloo") * 4 / 5)


# ---- MaxRL: the expectation of the estimator, by enumeration ------------------------------------------------------


def maxrl_expectation(logits, correct, size):
    """E[(1/G) sum_i A_i grad log p(a_i)] over all outcomes of a categorical policy, and grad p(correct)."""
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    outcomes = torch.tensor(list(itertools.product(range(len(logits)), repeat=size)))
    reward = torch.isin(outcomes, torch.tensor(correct)).double()
    groups = torch.arange(len(outcomes)).repeat_interleave(size)
    advantage = (
        episode_advantages(reward.flatten(), groups, torch.ones_like(groups), advantage_mode="maxrl")
        .double()
        .view_as(reward)
    )
    score = torch.eye(len(logits), dtype=torch.float64)[outcomes] - p  # grad log p(a) of a softmax policy
    estimate = (advantage[:, :, None] * score).mean(1)
    expectation = (p[outcomes].prod(1)[:, None] * estimate).sum(0)
    success = p[correct].sum()
    gradient = sum(p[a] * (torch.eye(len(logits), dtype=torch.float64)[a] - p) for a in correct)
    return expectation, gradient, success.item()


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize(
    ("logits", "correct"), [([0.3, -0.5, 1.0], [0]), ([0.0, 2.0, -1.0], [0, 2]), ([-3.0, 1.0], [0])]
)
def test_maxrl_is_unbiased_for_order_group_size_minus_one(size, logits, correct):
    expectation, gradient, p = maxrl_expectation(logits, correct, size)
    weight = (1 - (1 - p) ** (size - 1)) / p
    torch.testing.assert_close(expectation, weight * gradient, rtol=1e-5, atol=1e-8)
    # ... and not for order G, which the estimator without a baseline would have.
    assert not torch.allclose(expectation, (1 - (1 - p) ** size) / p * gradient, rtol=1e-3)


@pytest.mark.parametrize(("size", "ratio"), [(2, 1.0), (4, 2.71)])
def test_maxrl_ratio_at_one_tenth(size, ratio):
    expectation, gradient, p = maxrl_expectation([math.log(0.1), math.log(0.9)], [0], size)
    assert p == pytest.approx(0.1)
    torch.testing.assert_close(expectation / gradient, torch.full((2,), ratio, dtype=torch.float64), rtol=1e-5, atol=0)


# ---- token-level transforms ---------------------------------------------------------------------------------------

U = [0.2, 0.3, 1.8, 0.1, 0.9, 0.2, 2.1, 0.3, 0.1, 0.2]
PLAN = [i in (2, 6) for i in range(10)]


def weights(sepa_lambda):
    return tokens([1.0], [U], [PLAN], transform="gtpo_sepa", gtpo_beta=0.1, sepa_lambda=sepa_lambda).tolist()


def test_sepa_check_values():
    full = weights(1.0)
    assert [full[i] for i in range(10) if not PLAN[i]] == pytest.approx([0.946371] * 8, abs=5e-7)
    assert [full[2], full[6]] == pytest.approx([1.190323, 1.238710], abs=5e-7)
    assert weights(0.0)[4] == pytest.approx(1.045161, abs=5e-7)
    assert weights(0.5)[4] == pytest.approx(0.995766, abs=5e-7)


@pytest.mark.parametrize("transform", ["gtpo_hicra", "gtpo_sepa_hicra"])
def test_hicra_amplifies_good_and_softens_bad_planning_tokens(transform):
    flat = [[1.0, 1.0]] * 3  # equal uncertainty: every gtpo weight is exactly 1
    got = tokens([1.0, -1.0, 0.0], flat, [[True, False]] * 3, transform=transform, hicra_alpha=0.2, sepa_lambda=0.5)
    torch.testing.assert_close(got, torch.tensor([1.2, 1.0, -0.8, -1.0, 0.0, 0.0]))


def test_precomputed_advantages_pass_unchanged():
    advantages = [0.1, -7.25, 0.0]
    got = tokens(advantages, [[1.0, 2.0], [], [3.0]], [[True, False], [], [False]], transform="none")
    assert torch.equal(got, torch.tensor([0.1, 0.1, 0.0]))


@pytest.mark.parametrize("transform", TRANSFORM_MODES)
def test_zero_strengths_are_bit_for_bit_untransformed(transform):
    arguments = ([0.1, -1 / 3, -0.0], [U, U, U], [PLAN, PLAN, PLAN])
    want = tokens(*arguments, transform="none")
    got = tokens(*arguments, transform=transform, gtpo_beta=0.0, hicra_alpha=0.0, sepa_lambda=0.7)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_single_stages_can_be_switched_off_exactly():
    arguments = ([0.1, -1 / 3], [U, U], [PLAN, PLAN])
    gtpo = tokens(*arguments, transform="gtpo")
    assert torch.equal(tokens(*arguments, transform="gtpo_hicra", hicra_alpha=0.0), gtpo)
    assert torch.equal(tokens(*arguments, transform="gtpo_sepa", sepa_lambda=0.0), gtpo)
    assert not torch.equal(tokens(*arguments, transform="gtpo_sepa", sepa_lambda=0.5), gtpo)


def test_vanishing_uncertainty_weighs_every_token_one():
    got = tokens([2.0, 2.0], [[0.0, 1.9e-7], [0.0, 2.1e-7]], [[False, False]] * 2, transform="gtpo", gtpo_beta=0.5)
    assert got[:2].tolist() == [2.0, 2.0]  # mean below 1e-7
    torch.testing.assert_close(got[2:], torch.tensor([1.0, 3.0]))  # mean above it


def test_uncertainty_is_clamped():
    wide = tokens([1.0], [[-3.0, 80.0, math.inf]], [[False] * 3], transform="gtpo", gtpo_beta=1.0)
    assert torch.equal(wide, tokens([1.0], [[0.0, 50.0, 50.0]], [[False] * 3], transform="gtpo", gtpo_beta=1.0))
    torch.testing.assert_close(wide, torch.tensor([0.0, 1.5, 1.5]))


def test_weights_never_turn_negative():
    got = tokens([1.0], [[0.0, 4.0]], [[False, False]], transform="gtpo", gtpo_beta=3.0)
    torch.testing.assert_close(got, torch.tensor([0.0, 4.0]))


def test_completion_of_planning_tokens_only_is_not_pooled():
    arguments = ([1.0], [[0.5, 1.5]], [[True, True]])
    assert torch.equal(tokens(*arguments, transform="gtpo_sepa", sepa_lambda=1.0), tokens(*arguments, transform="gtpo"))


def test_no_gradient_flows():
    uncertainty = torch.tensor(U, requires_grad=True)
    got = token_advantages(
        torch.ones(1, requires_grad=True),
        uncertainty,
        torch.tensor(PLAN),
        torch.tensor([0, 10]),
        torch.tensor([0]),
        advantage_mode="precomputed",
        transform_mode="gtpo_sepa_hicra",
        sepa_lambda=0.5,
    )
    assert not got.requires_grad


# ---- ragged batches against the oracle, and invariants ------------------------------------------------------------

finite = lambda low, high: st.floats(low, high, width=32, allow_subnormal=False)  # noqa: E731


@st.composite
def ragged(draw):
    """A batch: rewards in [0, 1], group ids, and per completion a list of (uncertainty, planning); some are empty."""
    completion = st.lists(st.tuples(finite(0, 60), st.booleans()), max_size=12)
    reward = st.sampled_from([0.0, 0.25, 1.0]) | finite(0, 1)
    return draw(st.lists(st.tuples(reward, st.integers(-2, 2), completion), min_size=1, max_size=10))


@settings(max_examples=150, deadline=None)
@given(
    rows=ragged(),
    mode=st.sampled_from(ADVANTAGE_MODES),
    transform=st.sampled_from(TRANSFORM_MODES),
    beta=finite(0, 2),
    alpha=finite(0, 1),
    sepa_lambda=finite(0, 1),
)
def test_matches_the_oracle(rows, mode, transform, beta, alpha, sepa_lambda):
    rewards, groups, completions = ([row[k] for row in rows] for k in range(3))
    lengths = [len(c) for c in completions]
    got = token_advantages(
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor([u for c in completions for u, _ in c], dtype=torch.float32),
        torch.tensor([p for c in completions for _, p in c], dtype=torch.bool),
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        torch.tensor(groups, dtype=torch.int32),
        advantage_mode=mode,
        transform_mode=transform,
        gtpo_beta=beta,
        hicra_alpha=alpha,
        sepa_lambda=sepa_lambda,
    )
    episode = oracle.episode_advantages(rewards, groups, lengths, mode)
    want = [
        value
        for a, c in zip(episode, completions, strict=True)
        for value in oracle.token_advantages(
            a, [u for u, _ in c], [p for _, p in c], transform, beta=beta, alpha=alpha, sepa_lambda=sepa_lambda
        )
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=2e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(completion=st.lists(st.tuples(finite(0, 50), st.booleans()), min_size=1, max_size=20), sepa_lambda=finite(0, 1))
def test_pooling_keeps_the_mean_and_scales_the_variance(completion, sepa_lambda):
    u = torch.tensor([x for x, _ in completion], dtype=torch.float64)
    planning = torch.tensor([p for _, p in completion])
    if u.mean() < 1e-3:
        u = u + 1
    # With beta = 1 the weight is U'_t / mean(U'), so that the pooled uncertainty can be read off the advantages.
    advantages = tokens([1.0], [u.tolist()], [planning.tolist()], transform="gtpo_sepa", gtpo_beta=1.0,
                        sepa_lambda=sepa_lambda).double()  # fmt: skip
    assert advantages.mean().item() == pytest.approx(1, abs=1e-6)
    pooled = advantages * u.mean()
    assert pooled.mean().item() == pytest.approx(u.mean().item(), rel=1e-6)
    torch.testing.assert_close(pooled[planning], u[planning], rtol=1e-6, atol=1e-5)
    if (~planning).any():
        got, before = (x[~planning].var(correction=0).item() for x in (pooled, u))
        assert got == pytest.approx((1 - sepa_lambda) ** 2 * before, rel=1e-4, abs=1e-5 * u.mean().item() ** 2)


@settings(max_examples=60, deadline=None)
@given(rows=ragged(), mode=st.sampled_from(ADVANTAGE_MODES), data=st.data())
def test_permuting_and_splitting_completions_changes_nothing(rows, mode, data):
    def run(rows, advantage_mode, rewards=None):
        return token_advantages(
            torch.tensor([r for r, _, _ in rows] if rewards is None else rewards, dtype=torch.float64),
            torch.tensor([u for _, _, c in rows for u, _ in c], dtype=torch.float32),
            torch.tensor([p for _, _, c in rows for _, p in c], dtype=torch.bool),
            torch.tensor([0, *itertools.accumulate(len(c) for _, _, c in rows)]),
            torch.tensor([g for _, g, _ in rows]),
            advantage_mode=advantage_mode,
            transform_mode="gtpo_sepa_hicra",
            sepa_lambda=0.3,
        ).split([len(c) for _, _, c in rows])

    whole = run(rows, mode)
    order = data.draw(st.permutations(range(len(rows))))
    for position, values in zip(order, run([rows[i] for i in order], mode), strict=True):
        torch.testing.assert_close(values, whole[position])
    # A micro-batch is handed the advantages of the whole step: the same bits, alone or in company.
    episode = episode_advantages(
        torch.tensor([r for r, _, _ in rows], dtype=torch.float64),
        torch.tensor([g for _, g, _ in rows]),
        torch.tensor([len(c) for _, _, c in rows]),
        advantage_mode=mode,
    ).tolist()
    for i, row in enumerate(rows):
        assert torch.equal(run([row], "precomputed", [episode[i]])[0], whole[i])


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": torch.tensor([0.0, math.nan])}, ValueError, "rewards must be finite, got nan at index 1"),
        ({"rewards": torch.tensor([math.inf, 0.0])}, ValueError, "rewards must be finite, got inf at index 0"),
        ({"rewards": torch.tensor([0.0, 1.5])}, ValueError, r"rewards must lie in \[0, 1\] .*maxrl.* 1.5 at index 1"),
        ({"rewards": torch.tensor([-0.5, 1.0])}, ValueError, r"rewards must lie in \[0, 1\] .*maxrl.* -0.5 at index 0"),
        ({"rewards": torch.zeros(3)}, ValueError, r"cu_seqlens must have shape \[B \+ 1=4\], got \[3\]"),
        ({"uncertainty": torch.zeros(4, 1)}, ValueError, r"uncertainty must have shape \[N\], got \[4, 1\]"),
        ({"uncertainty": torch.tensor([0, 0, math.nan, 0])}, ValueError, "uncertainty must not hold NaN"),
        ({"planning": torch.zeros(4)}, TypeError, "planning must have a bool dtype, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, ValueError, r"cu_seqlens must start at 0, .*\(4\), got \[0, 3, 5\]"),
        ({"cu_seqlens": torch.tensor([1, 3, 4])}, ValueError, "cu_seqlens must start at 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, ValueError, "cu_seqlens must start at 0, never decrease"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, "cu_seqlens must .* leading 0"),
        ({"group_ids": torch.zeros(2)}, TypeError, "group_ids must have an int32 or int64 dtype"),
        ({"group_ids": torch.zeros(3, dtype=torch.int32)}, ValueError, r"group_ids must have shape \[B=2\], got \[3\]"),
        ({"advantage_mode": "gpro"}, ValueError, "advantage_mode must be one of grpo, .* got 'gpro'"),
        ({"transform_mode": "sepa"}, ValueError, "transform_mode must be one of none, gtpo, .* got 'sepa'"),
        ({"gtpo_beta": -0.1}, ValueError, "gtpo_beta must be a finite number >= 0.0, got -0.1"),
        ({"hicra_alpha": math.inf}, ValueError, "hicra_alpha must be a finite number >= 0.0, got inf"),
        ({"sepa_lambda": 1.1}, ValueError, r"sepa_lambda must be in \[0.0, 1.0\], got 1.1"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', 'reference', 'triton', got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "rewards": torch.tensor([0.0, 1.0]),
        "uncertainty": torch.ones(4),
        "planning": torch.zeros(4, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 3, 4], dtype=torch.int32),
        "group_ids": torch.tensor([0, 0], dtype=torch.int32),
        "advantage_mode": "maxrl",
        "transform_mode": "gtpo",
    }
    assert token_advantages(**arguments).shape == (4,)
    with pytest.raises(error, match=message):
        token_advantages(**arguments | change)
