"""Rewards to token advantages over packed ragged completions: ours against PyTorch and a device copy.

    python kernels/benchmarks/token_advantages.py --json token_advantages.json

GRPO's group statistics, then SEPA pooling and GTPO weights (gtpo_sepa): the chain that reads most. "Alone" is the
implementation without the checks of the public call, which read values and so wait for the device.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from harness import COPIES, Case, Check, Contender, Entry, Results, Target, compare, parse, time_ratio
from torch import Tensor

from retrain_kernels import dispatch, token_advantages

FLAGS = {
    "tokens": (2**18, 2**20, "tokens N in all"),
    "completions": (256, 1024, "completions B; their lengths are spread evenly between 0 and twice the mean"),
    "group": (16, 16, "completions of a prompt"),
}
MODES = {"advantage_mode": "grpo", "transform_mode": "gtpo_sepa", "gtpo_beta": 0.1, "sepa_lambda": 0.5}
MAX_UNCERTAINTY, SMALLEST_MEAN, GRPO_EPS = 50.0, 1e-7, 1e-6
ADVANTAGES = "advantage of every token"


@dataclass(frozen=True)
class Inputs:
    """rewards, group_ids [B]; uncertainty, planning [N]; cu_seqlens [B + 1]."""

    rewards: Tensor
    uncertainty: Tensor
    planning: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor

    @property
    def bytes_moved(self) -> int:
        """What has to be read once, and the float32 result."""
        return sum(t.nbytes for t in vars(self).values()) + 4 * len(self.uncertainty)

    def copy(self) -> Inputs:
        return Inputs(**{name: tensor.clone() for name, tensor in vars(self).items()})


def ragged(tokens: int, completions: int, generator: torch.Generator) -> Tensor:
    """cu_seqlens [B + 1] int32 of completions whose lengths are spread evenly between 0 and twice their mean."""
    ends = torch.rand(completions, generator=generator, dtype=torch.float64).cumsum(0)
    return torch.cat((torch.zeros(1), (ends / ends[-1] * tokens).round())).int()


def make_inputs(args: Namespace) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens, tokens = ragged(args.tokens, args.completions, generator), args.tokens
    inputs = Inputs(
        rewards=torch.randint(2, (args.completions,), generator=generator).float(),
        # Most tokens are nearly certain and some are not at all, as in reasoning.
        uncertainty=-(torch.rand(tokens, generator=generator).log() ** 3) / 6,
        planning=torch.rand(tokens, generator=generator) < 0.1,
        cu_seqlens=cu_seqlens,
        group_ids=(torch.arange(args.completions) // args.group).int(),
    )
    return Inputs(**{name: tensor.to(args.device) for name, tensor in vars(inputs).items()})


def plain(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectorised over the batch with index_add and gather: about twenty passes over the tokens."""
    rewards, group = inputs.rewards.to(dtype), inputs.group_ids.long()
    uncertainty = inputs.uncertainty.to(dtype).clamp(0, MAX_UNCERTAINTY)
    lengths = (inputs.cu_seqlens[1:] - inputs.cu_seqlens[:-1]).long()
    owner = torch.repeat_interleave(lengths, output_size=len(uncertainty))

    def total(values: Tensor, index: Tensor) -> Tensor:
        return values.new_zeros(len(rewards)).index_add(0, index, values)

    size = total(torch.ones_like(rewards), group)
    centred = rewards - (total(rewards, group) / size)[group]
    deviation = (total(centred.square(), group) / (size - 1).clamp(min=1)).sqrt()
    advantages = centred / (deviation[group] + GRPO_EPS)

    execution = (~inputs.planning).to(dtype)
    execution_mean = total(uncertainty * execution, owner) / total(execution, owner).clamp(min=1)
    share = MODES["sepa_lambda"]
    pooled = torch.where(inputs.planning, uncertainty, share * execution_mean[owner] + (1 - share) * uncertainty)
    mean = (total(pooled, owner) / lengths.clamp(min=1))[owner]
    weights = (1 + MODES["gtpo_beta"] * (pooled / mean.clamp(min=SMALLEST_MEAN) - 1)).clamp(min=0)
    return advantages[owner] * torch.where(mean < SMALLEST_MEAN, 1.0, weights)


def one_by_one(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """A group and a completion at a time, as the formulas are written."""
    rewards, uncertainty = inputs.rewards.to(dtype), inputs.uncertainty.to(dtype).clamp(0, MAX_UNCERTAINTY)
    advantages = torch.empty_like(rewards)
    for group in inputs.group_ids.unique():
        members = inputs.group_ids == group
        own = rewards[members]
        spread = own.std() if len(own) > 1 else own.new_zeros(())
        advantages[members] = (own - own.mean()) / (spread + GRPO_EPS)
    share, result = MODES["sepa_lambda"], torch.empty_like(uncertainty)
    bounds = inputs.cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        own, execution = uncertainty[start:end].clone(), ~inputs.planning[start:end]
        if execution.any():
            own[execution] = share * own[execution].mean() + (1 - share) * own[execution]
        mean = own.mean() if len(own) else own.new_ones(())
        weights = (1 + MODES["gtpo_beta"] * (own / mean - 1)).clamp(min=0) if mean >= SMALLEST_MEAN else 1.0
        result[start:end] = advantages[i] * weights
    return result


def build(args: Namespace) -> Case:
    first = make_inputs(args)
    copies = [first, *(first.copy() for _ in range(COPIES - 1))]
    kind = dispatch.resolve(args.impl, args.device)
    judge = Check({"advantages": one_by_one(first, torch.float64)}, {"advantages": plain(first)})
    alone = dispatch.implementation("token_advantages", args.impl, args.device)
    half = first.bytes_moved // 2
    buffers = [[torch.zeros(half, dtype=torch.uint8, device=args.device) for _ in range(2)] for _ in copies]

    def contender(key: str, name: str, compute: Callable[[Inputs], Tensor], computes: str = ADVANTAGES) -> Contender:
        @torch.no_grad()
        def run(i: int) -> Results:
            return {"advantages": compute(copies[i])}

        return Contender(key, name, computes, lambda: run, check=judge)

    def copy(i: int) -> Results:
        return {"copy": buffers[i][0].copy_(buffers[i][1])}

    def public(inputs: Inputs) -> Tensor:
        return token_advantages(**vars(inputs), **MODES, impl=args.impl)

    def bare(inputs: Inputs) -> Tensor:
        return alone(**vars(inputs), **MODES, hicra_alpha=0.0)

    elsewhere = "computes no token-level advantages: one a completion"
    contenders = [
        contender("ours", f"retrain ({kind}), alone", bare),
        contender("public", f"retrain ({kind}), public call", public, f"{ADVANTAGES}; checks"),
        contender("plain", "PyTorch, vectorised", plain),
        contender("one_by_one", "PyTorch, a completion at a time", one_by_one),
        Contender("liger", "Liger", "", lambda: copy, elsewhere),
        Contender("trl", "TRL", "", lambda: copy, elsewhere),
        Contender("copy", "device copy", f"reads and writes {half:,} bytes", lambda: copy),
    ]
    shape = {"N": args.tokens, "B": args.completions, "G": args.group}
    settings = {"impl": kind, "bytes_moved": first.bytes_moved, **MODES}
    return Case(shape, torch.float32, contenders, targets_of(args), settings, short=True)


def targets_of(args: Namespace) -> Callable[[Mapping[str, Entry]], list[Target]]:
    """Stated for a GPU, and for the many tokens that it takes to keep one busy."""

    def of_many_tokens(entries: Mapping[str, Entry]) -> list[Target]:
        return [Target("time over a copy of the bytes it must move", time_ratio(entries, "ours", "copy"), 2.0)]

    return of_many_tokens if args.device.type == "cuda" and args.tokens >= FLAGS["tokens"][1] else lambda _: []


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__ or "", FLAGS, argv)
    return compare("token_advantages", build(args), args)


if __name__ == "__main__":
    sys.exit(main())
