"""token_advantages, the Triton kernel: against the float64 oracle, plain torch and values that are exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import oracle
from retrain_kernels.token_advantages import (
    ADVANTAGE_MODES,
    TRANSFORM_MODES,
    episode_advantages,
    kernel,
    reference,
    token_advantages,
)
from retrain_kernels.token_advantages.kernel import Blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUP_MODES = [mode for mode in ADVANTAGE_MODES if mode != "precomputed"]
# So small that a completion takes many turns, and so do the search for its group and the sums of the whitening.
SMALL = Blocks(rows=2, lanes=4, owners=2)
FLOOR = 4 * 2.0**-24  # relative RMS: what remains where plain torch happens to be exact
STRENGTHS = {"gtpo_beta": 0.5, "hicra_alpha": 0.2, "sepa_lambda": 0.3}


def batch_of(lengths, group_ids, *, seed=0, planning=0.3, rewards=None, floating=torch.float32, integer=torch.int32):
    """The five positional arguments. rewards: [B], drawn from {0, 1/4, 1/2, 3/4, 1} where None."""
    g = torch.Generator().manual_seed(seed)
    if rewards is None:
        rewards = torch.randint(5, (len(lengths),), generator=g) / 4
    n = sum(lengths)
    return (
        torch.as_tensor(rewards).to(DEVICE, floating),
        torch.randn(n, generator=g).exp().to(DEVICE, floating),
        (torch.rand(n, generator=g) < planning).to(DEVICE),
        torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE, dtype=integer),
        torch.tensor(group_ids, device=DEVICE, dtype=integer),
    )


def compute(batch, mode="precomputed", transform="gtpo_sepa_hicra", *, blocks=None, **strengths):
    return kernel.token_advantages(
        *batch, advantage_mode=mode, transform_mode=transform, blocks=blocks, **STRENGTHS | strengths
    )


def ragged(batch):
    """Rewards, uncertainty, planning, lengths and group ids as lists; those of tokens one list a completion."""
    rewards, uncertainty, planning, cu, ids = (x.tolist() for x in batch)
    cut = list(itertools.pairwise(cu))
    return rewards, [uncertainty[a:b] for a, b in cut], [planning[a:b] for a, b in cut], [b - a for a, b in cut], ids


def exact(batch, mode, transform, *, gtpo_beta, hicra_alpha, sepa_lambda):
    """The oracle's float64 values: [N]."""
    rewards, uncertainty, planning, lengths, ids = ragged(batch)
    values = [
        oracle.token_advantages(a, u, p, transform, beta=gtpo_beta, alpha=hicra_alpha, sepa_lambda=sepa_lambda)
        for a, u, p in zip(oracle.episode_advantages(rewards, ids, lengths, mode), uncertainty, planning, strict=True)
    ]
    return torch.tensor([x for completion in values for x in completion], dtype=torch.float64)


def textbook(batch, mode, transform, *, gtpo_beta, hicra_alpha, sepa_lambda):
    """The formulas as one writes them down in torch, all in float32: what the kernel's error is measured by."""
    rewards, uncertainty, planning, cu, ids = (x.cpu() for x in batch)
    rewards, lengths = rewards.float(), cu.diff()
    episode, varied = torch.zeros_like(rewards), torch.zeros_like(rewards, dtype=torch.bool)
    for group in ids.unique():
        of = ids == group
        r = rewards[of]
        varied[of] = (r != r[0]).any()
        if (r != r[0]).any():
            gap = r - r.mean()
            share = {"grpo": r.std() + 1e-6, "rloo": (len(r) - 1) / len(r), "maxrl": r.mean() + 1e-6}.get(mode, 1.0)
            episode[of] = gap / share if mode != "maxrl" or r.mean() > 1e-6 else gap * 0
    if mode == "precomputed":
        episode = rewards
    if mode == "reinforce_pp":
        tokens = episode[varied].repeat_interleave(lengths[varied])
        spread = tokens.std(correction=0) if len(tokens) else torch.tensor(0.0)
        episode = (episode - tokens.mean()) / (spread + 1e-8) * varied if spread > 1e-8 else episode * 0
    result = []
    for a, u, plan in zip(
        episode, uncertainty.float().split(lengths.tolist()), planning.split(lengths.tolist()), strict=True
    ):
        u = u.clamp(0, 50)
        if "sepa" in transform and not plan.all():
            u = torch.where(plan, u, sepa_lambda * u[~plan].mean() + (1 - sepa_lambda) * u)
        values = a.expand(len(u))
        if "gtpo" in transform and len(u) and u.mean() >= 1e-7:
            values = a * (1 + gtpo_beta * (u / u.mean() - 1)).clamp(min=0)
        if "hicra" in transform:
            values = torch.where(plan, values + hicra_alpha * values.abs(), values)
        result.append(values)
    return torch.cat(result)


def relative_rms(got, want):
    scale = want.norm().item()
    return (got.cpu().double() - want).norm().item() / scale if scale else got.norm().item()


def assert_as_good_as_torch(batch, mode, transform, *, blocks=None, **strengths):
    strengths = STRENGTHS | strengths
    want = exact(batch, mode, transform, **strengths)
    got = compute(batch, mode, transform, blocks=blocks, **strengths)
    assert got.dtype == torch.float32 and got.shape == want.shape
    bound = 2 * relative_rms(textbook(batch, mode, transform, **strengths), want) + FLOOR
    assert relative_rms(got, want) <= bound


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ---- numeric results ----------------------------------------------------------------------------------------------

AWKWARD = [1, 63, 0, 500, 1000, 2, 4097]


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_awkward_lengths_in_every_mode(mode):
    assert_as_good_as_torch(batch_of(AWKWARD, [3, 3, -1, 3, -1, -1, 3]), mode, "gtpo_sepa_hicra")


@pytest.mark.parametrize("transform", TRANSFORM_MODES)
def test_awkward_lengths_with_every_transform(transform):
    batch = batch_of(AWKWARD, [0, 0, 1, 1, 0, 1, 0], seed=1)
    assert_as_good_as_torch(batch, "grpo", transform, blocks=Blocks(rows=4, lanes=32))


finite = lambda low, high: st.floats(low, high, width=32, allow_subnormal=False)  # noqa: E731


@st.composite
def batches(draw):
    completion = st.lists(st.tuples(finite(0, 60), st.booleans()), max_size=20)
    reward = st.sampled_from([0.0, 0.25, 1.0]) | finite(0, 1)
    rows = draw(st.lists(st.tuples(reward, st.integers(-1, 1), completion), min_size=1, max_size=6))
    rewards, ids, completions = ([row[k] for row in rows] for k in range(3))
    return (
        torch.tensor(rewards, device=DEVICE),
        torch.tensor([u for c in completions for u, _ in c], device=DEVICE, dtype=torch.float32),
        torch.tensor([p for c in completions for _, p in c], device=DEVICE, dtype=torch.bool),
        torch.tensor([0, *itertools.accumulate(map(len, completions))], device=DEVICE),
        torch.tensor(ids, device=DEVICE),
    )


@settings(max_examples=50, deadline=None)
@given(
    batch=batches(),
    mode=st.sampled_from(ADVANTAGE_MODES),
    transform=st.sampled_from(TRANSFORM_MODES),
    blocks=st.sampled_from([SMALL, Blocks(rows=1, lanes=8, owners=4), None]),
    gtpo_beta=finite(0, 2),
    hicra_alpha=finite(0, 1),
    sepa_lambda=finite(0, 1),
)
def test_ragged_batches(batch, mode, transform, blocks, gtpo_beta, hicra_alpha, sepa_lambda):
    strengths = {"gtpo_beta": gtpo_beta, "hicra_alpha": hicra_alpha, "sepa_lambda": sepa_lambda}
    assert_as_good_as_torch(batch, mode, transform, blocks=blocks, **strengths)


@pytest.mark.parametrize("floating", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["grpo", "reinforce_pp", "precomputed"])
def test_dtypes(floating, mode):
    integer = torch.int64 if floating == torch.float16 else torch.int32
    batch = batch_of([70, 0, 5, 33], [4, 4, -4, 4], rewards=[0.1, 1.0, 0.5, 0.7], floating=floating, integer=integer)
    assert_as_good_as_torch(batch, mode, "gtpo_sepa_hicra")


def test_float64_rewards_that_float32_cannot_tell_apart():
    batch = batch_of(
        [2, 2], [0, 0], rewards=torch.tensor([1.0, 1 + 1e-12], dtype=torch.float64), floating=torch.float64
    )
    want = exact(batch, "rloo", "none", **STRENGTHS)
    assert (want != 0).all()
    assert relative_rms(compute(batch, "rloo", "none"), want) <= FLOOR


def test_groups_in_any_order_with_any_ids():
    """Groups that lie interleaved over many blocks, with ids at the ends of their type."""
    ids = [0, -(2**63), 2**63 - 1, 2**32, 7]  # equal or close once cut to 32 bits
    batch = batch_of([1 + i % 2 for i in range(21)], [ids[i * i % 5] for i in range(21)], seed=3, integer=torch.int64)
    for mode in ("grpo", "reinforce_pp"):
        assert_as_good_as_torch(batch, mode, "none", blocks=SMALL)


def test_a_far_outlier_does_not_blur_the_deviation():
    """The kernel sums squares about its own reward: the outlier's sum must lose no more digits than the others'."""
    rewards = torch.tensor([1e4, *(k * 2.0**-20 for k in range(23))])
    assert_as_good_as_torch(batch_of([1] * 24, [0] * 24, rewards=rewards), "grpo", "none")
    rewards = 4096 + torch.arange(24) * 2.0**-11  # the last bit of float32: a computed mean would round
    assert_as_good_as_torch(batch_of([1] * 24, [0] * 24, rewards=rewards), "grpo", "none")


def test_sepa_check_values():
    u = [0.2, 0.3, 1.8, 0.1, 0.9, 0.2, 2.1, 0.3, 0.1, 0.2]
    batch = (
        torch.ones(1, device=DEVICE),
        torch.tensor(u, device=DEVICE),
        torch.tensor([i in (2, 6) for i in range(10)], device=DEVICE),
        torch.tensor([0, 10], device=DEVICE),
        torch.tensor([0], device=DEVICE),
    )
    weights = lambda share: compute(batch, transform="gtpo_sepa", gtpo_beta=0.1, sepa_lambda=share, blocks=SMALL)  # noqa: E731
    full = weights(1.0).tolist()
    assert [full[i] for i in (0, 1, 3, 4, 5, 7, 8, 9)] == pytest.approx([0.946371] * 8, abs=5e-7)
    assert [full[2], full[6]] == pytest.approx([1.190323, 1.238710], abs=5e-7)
    assert weights(0.0)[4].item() == pytest.approx(1.045161, abs=5e-7)
    assert weights(0.5)[4].item() == pytest.approx(0.995766, abs=5e-7)


@pytest.mark.parametrize(
    ("mode", "success", "failure"),
    [("grpo", 3.75, -0.25), ("maxrl", 15.0, -1.0), ("rloo", 1.0, -1 / 15), ("dr_grpo", 0.9375, -0.0625)],
)
def test_one_success_in_sixteen(mode, success, failure):
    got = compute(batch_of([1] * 16, [5] * 16, rewards=[1.0] + [0.0] * 15), mode, "none")
    # Published for eps -> 0; eps = 1e-6 over a deviation of 1/4 and a mean of 1/16 moves them by up to 1.6e-5.
    torch.testing.assert_close(got.cpu(), torch.tensor([success] + [failure] * 15), rtol=2e-5, atol=0)


# ---- what is exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GROUP_MODES)
def test_uniform_groups_are_exactly_zero(mode):
    rewards = [0.1] * 3 + [1 / 3] + [0.0, 1.0]
    batch = batch_of([3] * 6, [0, 0, 0, 1, 2, 2], rewards=rewards, floating=torch.float64)
    got = compute(batch, mode, "gtpo_sepa_hicra", blocks=SMALL)
    assert got[:12].tolist() == [0.0] * 12
    assert (got[12:] != 0).all()


@pytest.mark.parametrize("transform", TRANSFORM_MODES)
def test_zero_strengths_are_bit_for_bit_untransformed(transform):
    batch = batch_of([9, 4, 1], [0, 0, 0], rewards=[0.1, -1 / 3, -0.0])
    got = compute(batch, transform=transform, gtpo_beta=0.0, hicra_alpha=0.0, sepa_lambda=0.7, blocks=SMALL)
    assert same_bits(got, batch[0].repeat_interleave(batch[3].diff()))


def test_single_stages_can_be_switched_off_exactly():
    batch = batch_of([9, 4], [0, 0], rewards=[0.1, -1 / 3])
    gtpo = compute(batch, transform="gtpo")
    assert same_bits(compute(batch, transform="gtpo_hicra", hicra_alpha=0.0), gtpo)
    assert same_bits(compute(batch, transform="gtpo_sepa", sepa_lambda=0.0), gtpo)
    assert not same_bits(compute(batch, transform="gtpo_sepa"), gtpo)


def test_equal_or_vanishing_uncertainty_weighs_every_token_one():
    """Exactly: the mean of equal numbers is that number, however many there are."""
    batch = batch_of([700, 3], [0, 0], rewards=[1 / 3, -7.0], planning=0.5)
    for value in (0.1, 17.3, 0.0, 0.9e-7, -1.0):
        flat = (batch[0], torch.full_like(batch[1], value), *batch[2:])
        assert same_bits(compute(flat, transform="gtpo_sepa"), batch[0].repeat_interleave(batch[3].diff()))
    above = (batch[0], torch.tensor([0.0] * 700 + [0.0, 0.0, 3.3e-7], device=DEVICE), *batch[2:])
    got = compute(above, transform="gtpo")[700:].cpu()
    torch.testing.assert_close(got, torch.tensor([-3.5, -3.5, -14.0]), rtol=1e-6, atol=0)


def test_uncertainty_is_clamped():
    batch = batch_of([3], [0], rewards=[1.0])
    wide, narrow = (
        compute((batch[0], torch.tensor(u, device=DEVICE), *batch[2:]), transform="gtpo", gtpo_beta=1.0)
        for u in ([-math.inf, 80.0, math.inf], [0.0, 50.0, 50.0])
    )
    assert same_bits(wide, narrow)


def test_weights_never_turn_negative():
    batch = (*batch_of([2], [0], rewards=[1.0])[:1], torch.tensor([0.0, 4.0], device=DEVICE), *batch_of([2], [0])[2:])
    assert compute(batch, transform="gtpo", gtpo_beta=3.0).tolist() == [0.0, 4.0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_no_planning_tokens(share):
    batch = batch_of([9, 0, 4], [0, 0, 0], planning=share)
    assert_as_good_as_torch(batch, "precomputed", "gtpo_sepa_hicra", blocks=SMALL)
    if share:  # nothing to pool
        assert same_bits(compute(batch, transform="gtpo_sepa", sepa_lambda=1.0), compute(batch, transform="gtpo"))


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_nothing_to_do(mode):
    assert compute(batch_of([], []), mode).shape == (0,)
    assert compute(batch_of([0, 0, 0], [1, 1, 2]), mode).shape == (0,)


def test_inputs_need_not_be_contiguous():
    batch = batch_of([9, 4, 0, 2], [1, 0, 1, 0], seed=2)
    spread = tuple(torch.stack([x, x.flip(0), x.flip(0)], 1)[:, 0] for x in batch)
    assert not any(x.is_contiguous() for x in spread)
    assert same_bits(compute(spread, "grpo"), compute(batch, "grpo"))
    expanded = (torch.full((), 0.5, device=DEVICE).expand(4), *batch[1:])
    assert same_bits(compute(expanded), compute((expanded[0].clone(), *batch[1:])))


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_a_completion_gets_the_same_bits_in_any_company(mode):
    lengths, ids = [9, 1, 30, 0, 17], [0, 1, 0, 1, 1]
    batch = batch_of(lengths, ids, seed=5)
    parts = compute(batch, mode, blocks=SMALL).split(lengths)
    order = [3, 2, 4, 0, 1]
    shuffled = (
        batch[0][order],
        *(torch.cat([x.split(lengths)[i] for i in order]) for x in batch[1:3]),
        torch.tensor([0, *itertools.accumulate(lengths[i] for i in order)], device=DEVICE),
        batch[4][order],
    )
    moved = compute(shuffled, mode, blocks=SMALL)
    torch.testing.assert_close(moved, torch.cat([parts[i] for i in order]), rtol=2e-7, atol=0)
    # A micro-batch is handed the advantages of the whole step.
    episode = episode_advantages(batch[0], batch[4], batch[3].diff(), advantage_mode=mode)
    whole = compute((episode, *batch[1:]), blocks=SMALL).split(lengths)
    for i, (start, end) in enumerate(itertools.pairwise(batch[3].tolist())):
        alone = (episode[i : i + 1], *(x[start:end] for x in batch[1:3]), torch.tensor([0, end - start], device=DEVICE))
        assert same_bits(compute((*alone, batch[4][i : i + 1]), blocks=SMALL), whole[i])


# ---- whitening ----------------------------------------------------------------------------------------------------


def test_whitening_over_many_partial_sums():
    lengths = [(7 * i) % 5 for i in range(27)]
    batch = batch_of(lengths, [i // 4 for i in range(27)], seed=4)
    got = compute(batch, "reinforce_pp", "none", blocks=Blocks(rows=8, lanes=4, owners=1)).double()
    assert relative_rms(got, exact(batch, "reinforce_pp", "none", **STRENGTHS)) <= FLOOR
    # Uniform groups got exactly 0 and are left out of the statistics.
    assert got[got != 0].mean().item() == pytest.approx(0, abs=1e-7)
    assert got[got != 0].std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whitening_of_a_narrow_spread():
    """The mean is a million times the spread: a sum of squares minus a squared mean would keep nothing of it."""
    rewards = torch.tensor([1.0, 0.0, 1.0 + 2.0**-20, 0.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    batch = batch_of([500, 0, 400, 0, 300, 0, 9], [0, 0, 1, 1, 2, 2, 3], rewards=rewards, floating=torch.float64)
    want = exact(batch, "reinforce_pp", "none", **STRENGTHS)
    assert 1 < want.abs().max() < 2
    assert relative_rms(compute(batch, "reinforce_pp", "none", blocks=SMALL), want) <= FLOOR


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.3, 0.3], [1.0, 1.0, 0.3, 0.3]])
def test_whitening_without_spread_over_tokens_is_zero(rewards):
    batch = batch_of([7, 0, 2, 2], [0, 0, 1, 1], rewards=rewards)
    assert compute(batch, "reinforce_pp", "none").tolist() == [0.0] * 11


# ---- the launch ---------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel: notes its launches, and passes them on to the kernel given, if any."""

    def __init__(self, launched=None):
        self.launched, self.launches = launched, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(grid)
            if self.launched is not None:
                self.launched[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_one_launch(monkeypatch, mode):
    main, before = Recorder(kernel.advantages_kernel), Recorder(kernel.whitening_kernel)
    monkeypatch.setattr(kernel, "advantages_kernel", main)
    monkeypatch.setattr(kernel, "whitening_kernel", before)
    compute(batch_of([1, 2, 0], [0, 0, 0]), mode, blocks=SMALL)
    assert main.launches == [(3,)]
    assert before.launches == ([(2,)] if mode == "reinforce_pp" else [])


class Waits(TorchFunctionMode):
    """Counts the calls that wait for the device (but for torch.unique, which the reference cannot do without)."""

    WAITING = frozenset(
        getattr(torch.Tensor, name)
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.WAITING
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_a_call_waits_for_the_device_once(monkeypatch, mode):
    for name in ("advantages_kernel", "whitening_kernel"):
        monkeypatch.setattr(kernel, name, Recorder())
    batch = batch_of([1, 2, 0], [0, 0, 0])
    lengths = batch[3].diff()
    with Waits() as control:
        assert (batch[0] >= 0).all() and batch[0].sum().item() > -1
    assert control.count == 2
    with Waits() as wrapper:
        compute(batch, mode)
    assert wrapper.count == 0
    with Waits() as call:
        token_advantages(*batch, advantage_mode=mode, transform_mode="gtpo", impl="triton")
    assert call.count == 1
    with Waits() as call:
        episode_advantages(batch[0], batch[4], lengths, advantage_mode=mode)
    assert call.count == 1


@pytest.mark.parametrize(
    ("tokens", "completions", "lanes"),
    [(1, 1, 32), (3, 1000, 32), (512, 1, 32), (513, 1, 64), (1_000_000, 1000, 64), (1_000_000, 2, 512)],
)
def test_tiles_fit_the_average_completion(tokens, completions, lanes):
    blocks = kernel.fitting_blocks(tokens, completions)
    assert (blocks.rows, blocks.lanes, blocks.warps) == (16, lanes, lanes // 32)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="sparse files are memory of the host")
def test_offsets_beyond_32_bits(tmp_path):
    start = 2**31 + 7
    tensors = {}
    for name, dtype in (("uncertainty", torch.float16), ("planning", torch.bool), ("advantages", torch.float32)):
        tensors[name] = torch.from_file(str(tmp_path / name), shared=True, size=start + 20, dtype=dtype)
    rewards, uncertainty, planning, cu, ids = batch_of([20], [0], floating=torch.float16)
    tensors["uncertainty"][start:], tensors["planning"][start:] = uncertainty, planning
    kernel.advantages_kernel[(1,)](
        rewards,
        tensors["uncertainty"],
        tensors["planning"],
        cu.long() + start,
        ids,
        None,
        tensors["advantages"],
        1,
        *STRENGTHS.values(),
        MODE="precomputed",
        POOL=True,
        WEIGH=True,
        AMPLIFY=True,
        ROWS=SMALL.rows,
        LANES=SMALL.lanes,
        OWNERS=SMALL.owners,
    )
    want = compute((rewards, uncertainty, planning, cu, ids), blocks=SMALL)
    assert same_bits(tensors["advantages"][start:].clone(), want)


# ---- the public function ------------------------------------------------------------------------------------------


def test_the_public_function_runs_the_kernel(monkeypatch):
    batch = batch_of([9, 0, 4, 30], [0, 1, 0, 1], seed=6)
    options = {"advantage_mode": "rloo", "transform_mode": "gtpo_sepa_hicra", **STRENGTHS}
    got = token_advantages(batch[0].requires_grad_(), *batch[1:], **options, impl="triton")
    assert not got.requires_grad
    assert same_bits(got, compute(batch, "rloo"))
    torch.testing.assert_close(got, reference.token_advantages(*batch, **options), rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(kernel, "token_advantages", None)
    if DEVICE.type == "cpu":
        assert token_advantages(*batch, **options).shape == got.shape  # "auto" is the reference on a CPU


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = [x.cpu() for x in batch_of([2], [0])]
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: Triton runs on CUDA and ROCm tensors'):
        token_advantages(*batch, advantage_mode="grpo", transform_mode="gtpo", impl="triton")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.tensor([0.0, math.nan]), "rewards must be finite, got nan at index 1"),
        (0, torch.tensor([0.0, 1.5]), r"rewards must lie in \[0, 1\] .*maxrl.* 1.5 at index 1"),
        (1, torch.tensor([0.0, math.nan, 0.0, 0.0]), "uncertainty must not hold NaN"),
        (3, torch.tensor([0, 5, 4]), r"cu_seqlens must start at 0, .*\(4\), got \[0, 5, 4\]"),
    ],
)
def test_bad_values_are_named_before_any_launch(monkeypatch, position, value, message):
    launches = Recorder()
    monkeypatch.setattr(kernel, "advantages_kernel", launches)
    arguments = list(batch_of([3, 1], [0, 0]))
    arguments[position] = value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        token_advantages(*arguments, advantage_mode="maxrl", transform_mode="gtpo", impl="triton")
    assert launches.launches == []
