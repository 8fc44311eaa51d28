"""token_advantages in Triton: one launch, and a small one before it for "reinforce_pp". README.md, part 3."""

# A launch takes num_warps beside the kernel's own parameters, and Triton's stubs call every result a tensor or a tuple.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrain_kernels import dispatch
from retrain_kernels.token_advantages.episode import GRPO_EPS, MAXRL_EPS, WHITEN_EPS
from retrain_kernels.token_advantages.reference import MAX_UNCERTAINTY, MIN_MEAN_UNCERTAINTY, active_stages

_GRPO_EPS = tl.constexpr(GRPO_EPS)
_MAXRL_EPS = tl.constexpr(MAXRL_EPS)
_WHITEN_EPS = tl.constexpr(WHITEN_EPS)
_MAX_UNCERTAINTY = tl.constexpr(MAX_UNCERTAINTY)
_MIN_MEAN_UNCERTAINTY = tl.constexpr(MIN_MEAN_UNCERTAINTY)

# It changes from batch to batch, and little would be gained from programs compiled for its divisors.
_SIZES = ["completions"]
_WARP = 32


class Blocks(NamedTuple):
    """How much a program handles at a time; powers of two. Results depend on them by rounding alone.

    rows, lanes: a tile of rows * lanes tokens of a completion; one warp for every 32 lanes. owners: completions of a
    program of the whitening launch.
    """

    rows: int = 16
    lanes: int = 32
    owners: int = 8

    @property
    def warps(self) -> int:
        return max(self.lanes // _WARP, 1)


def fitting_blocks(num_tokens: int, completions: int) -> Blocks:
    """A tile about as large as the average completion: smaller ones take many trips, larger ones are mostly masked."""
    rows = Blocks().rows
    lanes = triton.next_power_of_2(triton.cdiv(num_tokens, completions * rows))
    return Blocks(rows=rows, lanes=min(max(lanes, _WARP), 16 * _WARP))


def token_advantages(
    rewards: Tensor,
    uncertainty: Tensor,
    planning: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    advantage_mode: str,
    transform_mode: str,
    gtpo_beta: float,
    hicra_alpha: float,
    sepa_lambda: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """See `retrain_kernels.token_advantages`; arguments are already checked. Never waits for the device.

    blocks: None means `fitting_blocks`.
    """
    stages = active_stages(transform_mode, gtpo_beta=gtpo_beta, hicra_alpha=hicra_alpha, sepa_lambda=sepa_lambda)
    rewards, uncertainty, planning, cu_seqlens, group_ids = (
        tensor.contiguous() for tensor in (rewards, uncertainty, planning, cu_seqlens, group_ids)
    )
    completions = len(rewards)
    advantages = torch.empty(len(uncertainty), dtype=torch.float32, device=rewards.device)
    if len(advantages) == 0:
        return advantages
    blocks = blocks or fitting_blocks(len(advantages), completions)
    partials = None
    with dispatch.on_device(rewards.device):
        if advantage_mode == "reinforce_pp":
            programs = triton.cdiv(completions, blocks.owners)
            partials = torch.empty(programs, 3, dtype=torch.float64, device=rewards.device)
            whitening_kernel[(programs,)](
                rewards,
                group_ids,
                cu_seqlens,
                partials,
                completions,
                OWNERS=blocks.owners,
                SCAN=blocks.lanes,
                LANES=blocks.lanes,
                num_warps=blocks.warps,
            )
        advantages_kernel[(completions,)](
            rewards,
            uncertainty,
            planning,
            cu_seqlens,
            group_ids,
            partials,
            advantages,
            completions,
            gtpo_beta,
            hicra_alpha,
            sepa_lambda,
            MODE=advantage_mode,
            POOL=stages.pool,
            WEIGH=stages.weigh,
            AMPLIFY=stages.amplify,
            ROWS=blocks.rows,
            LANES=blocks.lanes,
            OWNERS=blocks.owners,
            num_warps=blocks.warps,
        )
    return advantages


@triton.jit(do_not_specialize=_SIZES)
def advantages_kernel(
    rewards,
    uncertainty,
    planning,
    cu_seqlens,
    group_ids,
    partials,
    advantages,
    completions,
    beta,
    alpha,
    sepa_lambda,
    MODE: tl.constexpr,
    POOL: tl.constexpr,
    WEIGH: tl.constexpr,
    AMPLIFY: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    OWNERS: tl.constexpr,
):
    """One program a completion. partials: what `whitening_kernel` wrote, None in every mode but "reinforce_pp"."""
    own = tl.program_id(0)
    start = tl.load(cu_seqlens + own).to(tl.int64)
    end = tl.load(cu_seqlens + own + 1).to(tl.int64)
    if MODE == "precomputed":
        credit = tl.load(rewards + own).to(tl.float32)
    else:
        advantage, varied = _group_advantages(
            rewards, group_ids, own + tl.arange(0, 1), completions, MODE, ROWS * LANES, LANES
        )
        if MODE == "reinforce_pp":
            whitened = _whiten(advantage, partials, tl.cdiv(completions, OWNERS), LANES)
            advantage = tl.where(varied, whitened, 0.0)
        credit = tl.sum(advantage, 0).to(tl.float32)
    # A tile is two-dimensional so that the rows of a column are one thread's: it adds them up by itself.
    offsets = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if WEIGH:
        mean, execution_mean = _mean_uncertainty(uncertainty, planning, start, end, offsets, POOL, ROWS, LANES)
        usable = mean >= _MIN_MEAN_UNCERTAINTY
        slope = tl.where(usable, beta / tl.where(usable, mean, 1.0), 0.0)
        if POOL:
            # Pooling keeps the mean, so that its effect on an execution token's weight is known without a third pass.
            execution_base = (1 + slope * sepa_lambda * (execution_mean - mean)).to(tl.float32)
            execution_slope = (slope * (1 - sepa_lambda)).to(tl.float32)
        mean = mean.to(tl.float32)
        slope = slope.to(tl.float32)
    for begin in range(start, end, ROWS * LANES):
        inside = _inside(offsets, begin, end, ROWS * LANES)
        if POOL or AMPLIFY:
            plan = tl.load(planning + begin + offsets, mask=inside, other=0) != 0
        values = tl.broadcast_to(credit, [ROWS, LANES])
        if WEIGH:
            gap = _clamped(uncertainty, begin, offsets, inside) - mean
            if POOL:
                weights = tl.where(plan, 1 + slope * gap, execution_base + execution_slope * gap)
            else:
                weights = 1 + slope * gap
            values *= tl.maximum(weights, 0.0)
        if AMPLIFY:
            values = tl.where(plan, values + alpha * tl.abs(values), values)
        tl.store(advantages + begin + offsets, values, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def whitening_kernel(
    rewards,
    group_ids,
    cu_seqlens,
    partials,
    completions,
    OWNERS: tl.constexpr,
    SCAN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Tokens, mean and centred square sum of the group-centred rewards over the tokens of OWNERS completions.

    Writes them to partials [programs, 3] float64. Completions of uniform groups count no tokens.
    """
    program = tl.program_id(0)
    own = program * OWNERS + tl.arange(0, OWNERS)
    exists = own < completions
    # Where there is none, the last completion stands in, and counts no tokens.
    place = tl.minimum(own, completions - 1)
    centred, varied = _group_advantages(rewards, group_ids, place, completions, "reinforce_pp", SCAN, LANES)
    length = tl.load(cu_seqlens + place + 1) - tl.load(cu_seqlens + place)
    tokens = tl.where(exists & varied, length, 0).to(tl.float64)
    count = tl.sum(tokens, 0)
    mean = tl.sum(tokens * centred, 0) / tl.maximum(count, 1.0)
    gap = centred - mean
    tl.store(partials + 3 * program, count)
    tl.store(partials + 3 * program + 1, mean)
    tl.store(partials + 3 * program + 2, tl.sum(tokens * gap * gap, 0))


@triton.jit
def _group_advantages(
    rewards,
    group_ids,
    own,
    completions,
    MODE: tl.constexpr,
    SCAN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Episode advantages of the completions own [I], float64, and whether the rewards of their groups differ.

    "reinforce_pp" is left unwhitened.
    """
    own_id = tl.load(group_ids + own)[:, None]
    own_reward = tl.load(rewards + own).to(tl.float64)[:, None]
    reach = _reach(group_ids, own, own_id, completions, SCAN)
    first = tl.maximum(tl.min(own, 0) - reach, 0)
    last = tl.minimum(tl.max(own, 0) + reach + 1, completions)
    size = tl.zeros([own.shape[0]], tl.int32)
    differing = tl.zeros([own.shape[0]], tl.int32)
    # Sums of r_j - r_i and its square: exact differences, and README.md shows the variance from them well-conditioned.
    shift = tl.zeros([own.shape[0]], tl.float64)
    square = tl.zeros([own.shape[0]], tl.float64)
    total = tl.zeros([own.shape[0]], tl.float64)
    for begin in range(first, last, LANES):
        index = begin + tl.arange(0, LANES)[None, :]
        inside = index < last
        others = tl.load(rewards + index, mask=inside, other=0).to(tl.float64)
        member = inside & (tl.load(group_ids + index, mask=inside, other=0) == own_id)
        gap = tl.where(member, others - own_reward, 0.0)
        size += tl.sum(member.to(tl.int32), 1)
        differing += tl.sum((gap != 0).to(tl.int32), 1)
        shift += tl.sum(gap, 1)
        if MODE == "grpo":
            square += tl.sum(gap * gap, 1)
        if MODE == "maxrl":
            total += tl.sum(tl.where(member, others, 0.0), 1)
    centred = -shift / size
    rest = tl.maximum(size - 1, 1)
    if MODE == "grpo":
        variance = tl.maximum(square + shift * centred, 0.0) / rest
        advantage = centred / (tl.sqrt(variance) + _GRPO_EPS)
    elif MODE == "rloo":
        advantage = -shift / rest
    elif MODE == "maxrl":
        mean = total / size
        advantage = tl.where(mean > _MAXRL_EPS, centred / (mean + _MAXRL_EPS), 0.0)
    else:
        advantage = centred
    varied = differing > 0
    return tl.where(varied, advantage, 0.0), varied


@triton.jit
def _reach(group_ids, own, own_id, completions, SCAN: tl.constexpr):
    """The largest distance, in places, of a completion of own [I] from a member of its group."""
    farthest = tl.zeros([own.shape[0], SCAN], tl.int32)
    for begin in range(0, completions, SCAN):
        index = begin + tl.arange(0, SCAN)[None, :]
        inside = index < completions
        member = inside & (tl.load(group_ids + index, mask=inside, other=0) == own_id)
        farthest = tl.maximum(farthest, tl.where(member, tl.abs(index - own[:, None]), 0))
    return tl.max(farthest)


@triton.jit
def _whiten(advantage, partials, programs, LANES: tl.constexpr):
    """(a - mu) / (sigma + eps), from the partial sums of all programs; 0 where sigma is too small to divide by."""
    lane = tl.arange(0, LANES)
    count = tl.zeros([LANES], tl.float64)
    total = tl.zeros([LANES], tl.float64)
    for begin in range(0, programs, LANES):
        part = partials + 3 * (begin + lane)
        inside = begin + lane < programs
        tokens = tl.load(part, mask=inside, other=0.0)
        count += tokens
        total += tokens * tl.load(part + 1, mask=inside, other=0.0)
    tokens = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(total, 0) / tokens
    square = tl.zeros([LANES], tl.float64)
    for begin in range(0, programs, LANES):
        part = partials + 3 * (begin + lane)
        inside = begin + lane < programs
        gap = tl.load(part + 1, mask=inside, other=0.0) - mean
        square += tl.load(part + 2, mask=inside, other=0.0) + tl.load(part, mask=inside, other=0.0) * gap * gap
    spread = tl.sqrt(tl.sum(square, 0) / tokens)
    return tl.where(spread > _WHITEN_EPS, (advantage - mean) / (spread + _WHITEN_EPS), 0.0)


@triton.jit
def _mean_uncertainty(
    uncertainty, planning, start, end, offsets, POOL: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Mean of the clamped uncertainty over a completion, and over its execution tokens (POOL only): float64."""
    total = tl.zeros([LANES], tl.float64)
    execution_total = tl.zeros([LANES], tl.float64)
    executions = tl.zeros([LANES], tl.int64)
    for begin in range(start, end, ROWS * LANES):
        inside = _inside(offsets, begin, end, ROWS * LANES)
        values = _clamped(uncertainty, begin, offsets, inside).to(tl.float64)
        total += tl.sum(values, 0)
        if POOL:
            execution = tl.load(planning + begin + offsets, mask=inside, other=1) == 0
            execution_total += tl.sum(tl.where(execution, values, 0.0), 0)
            executions += tl.sum(execution.to(tl.int32), 0)
    mean = tl.sum(total, 0) / tl.maximum(end - start, 1)
    execution_mean = tl.sum(execution_total, 0) / tl.maximum(tl.sum(executions, 0), 1)
    return mean, execution_mean


@triton.jit
def _inside(offsets, begin, end, TILE: tl.constexpr):
    # The bound as int32: 64-bit comparisons, one a token, would double the registers of a program.
    return offsets < tl.minimum(end - begin, TILE).to(tl.int32)


@triton.jit
def _clamped(uncertainty, begin, offsets, inside):
    """A tile of uncertainty in [0, 50], float32; 0 outside the completion."""
    values = tl.load(uncertainty + begin + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(values, 0.0), _MAX_UNCERTAINTY)
