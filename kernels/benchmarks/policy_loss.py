"""The PPO loss of a packed ragged batch, forward and backward: ours against PyTorch, Liger, TRL and a device copy.

    python kernels/benchmarks/policy_loss.py --json policy_loss.json

Clipped surrogate with DAPO's bounds, mean over tokens, and the sums that are logged. Liger and TRL take padded batches
and one advantage a completion, so every token of a completion has the same one here. "Alone" is the implementation
without the checks of the public call, which read values and so wait for the device.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from harness import (
    COPIES,
    Case,
    Check,
    Contender,
    Entry,
    Results,
    Run,
    Target,
    compare,
    not_installed,
    parse,
    time_ratio,
)
from token_advantages import ragged
from torch import Tensor

from retrain_kernels import dispatch, policy_loss
from retrain_kernels.policy_loss.reference import Objective

FLAGS = {
    "tokens": (2**18, 2**20, "tokens N in all"),
    "completions": (256, 1024, "completions B; their lengths are spread evenly between 0 and twice the mean"),
}
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LossOfPadded = Callable[["Padded"], Results]

LOGGED = "loss, ratio, share clipped, KL; gradient"


@dataclass(frozen=True)
class Inputs:
    """logprob, old_logprob, advantages [N] float32; cu_seqlens [B + 1]."""

    logprob: Tensor
    old_logprob: Tensor
    advantages: Tensor
    cu_seqlens: Tensor

    @property
    def bytes_moved(self) -> int:
        """Three vectors and cu_seqlens are read; the gradient is written in forward, read and written in backward."""
        return 3 * self.logprob.nbytes + self.cu_seqlens.nbytes + 3 * self.logprob.nbytes

    def copy(self) -> Inputs:
        return Inputs(**{name: tensor.clone() for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Padded:
    """logprob, old_logprob, mask [B, T]; advantages [B]; T: the longest completion."""

    logprob: Tensor
    old_logprob: Tensor
    mask: Tensor
    advantages: Tensor


def make_inputs(args: Namespace) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = ragged(args.tokens, args.completions, generator)
    logprob = torch.rand(args.tokens, generator=generator).log()
    ratio = (0.15 * torch.randn(args.tokens, generator=generator)).exp()
    # On the edge of the interval rounding decides whether a token has a gradient at all.
    on_edge = ((ratio - (1 - CLIP_LOW)).abs() < 1e-3) | ((ratio - (1 + CLIP_HIGH)).abs() < 1e-3)
    # Around one, so that the loss is no difference of large sums.
    advantages = 1 + torch.randn(args.completions, generator=generator)
    inputs = Inputs(
        logprob=logprob,
        old_logprob=logprob - ratio.masked_fill(on_edge, 1.1).log(),
        advantages=advantages.repeat_interleave(cu_seqlens.diff().long()),
        cu_seqlens=cu_seqlens,
    )
    return Inputs(**{name: tensor.to(args.device) for name, tensor in vars(inputs).items()})


def padded(inputs: Inputs) -> Padded:
    lengths = inputs.cu_seqlens.diff()
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    advantages = spread(inputs.advantages)[:, 0]
    return Padded(spread(inputs.logprob), spread(inputs.old_logprob), mask.int(), advantages)


def differentiate(logprob: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, list[Tensor]]]) -> Results:
    """Loss, gradient and what is logged. loss_of: log-probs to loss and logged numbers."""
    leaf = logprob.detach().requires_grad_()
    loss, logged = loss_of(leaf)
    results = {"loss": loss.detach(), "grad_logprob": torch.autograd.grad(loss, leaf)[0]}
    return results | ({"logged": torch.stack(logged)} if logged else {})


def plain(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Results:
    old, advantages = inputs.old_logprob.to(dtype), inputs.advantages.to(dtype)

    def loss_of(logprob: Tensor) -> tuple[Tensor, list[Tensor]]:
        log_ratio = (logprob - old).clamp(-20, 20)
        ratio = log_ratio.exp()
        free, clipped = ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages
        logged = [ratio.detach().mean(), (clipped < free).to(dtype).mean(), -log_ratio.detach().mean()]
        return -torch.minimum(free, clipped).mean(), logged

    return differentiate(inputs.logprob.to(dtype), loss_of)


def ours(inputs: Inputs, compute: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Results:
    def loss_of(logprob: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss, sums = compute(logprob, inputs.old_logprob, inputs.advantages, inputs.cu_seqlens)
        return loss, [sums[name] / len(logprob) for name in ("ratio_sum", "clipped_sum", "kl_sum")]

    return differentiate(inputs.logprob, loss_of)


def liger(on_gpu: bool) -> LossOfPadded:
    """The loss inside Liger's fused linear GRPO loss, compiled as it is there."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    settings = {"epsilon_low": CLIP_LOW, "epsilon_high": CLIP_HIGH, "beta": 0.0, "loss_type": "bnpo"}
    loss_fn: Callable[..., Any] = LigerFusedLinearGRPOFunction.ppo_loss_fn
    loss_fn = torch.compile(loss_fn) if on_gpu else loss_fn

    def compute(batch: Padded) -> Results:
        def loss_of(logprob: Tensor) -> tuple[Tensor, list[Tensor]]:
            loss, _ = loss_fn(
                logprob, batch.mask, batch.advantages, batch.mask, old_per_token_logps=batch.old_logprob, **settings
            )
            return loss, []

        return differentiate(batch.logprob, loss_of)

    return compute


def trl() -> LossOfPadded:
    """TRL's GRPOTrainer._compute_loss as it stands, on a trainer of which there is only what that method asks for."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction="sum": x, num_processes=1)

    def compute(batch: Padded) -> Results:
        def loss_of(logprob: Tensor) -> tuple[Tensor, list[Tensor]]:
            trainer: Any = SimpleNamespace(
                _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, torch.zeros_like(logprob), None),
                _metrics={"train": defaultdict(list)},
                _entropy_bonus_enabled=False,
                accelerator=accelerator,
                args=SimpleNamespace(delta=None),
                aux_loss_enabled=False,
                beta=0.0,
                current_gradient_accumulation_steps=1,
                epsilon_high=CLIP_HIGH,
                epsilon_low=CLIP_LOW,
                importance_sampling_level="token",
                loss_type="bnpo",
                model=SimpleNamespace(training=True),
                off_policy_mask_threshold=None,
                top_entropy_quantile=1.0,
                use_vllm=False,
            )
            no_prompt = batch.mask[:, :0]
            batch_of_trl = {
                "prompt_ids": no_prompt,
                "prompt_mask": no_prompt,
                "completion_ids": batch.mask,
                "completion_mask": batch.mask,
                "advantages": batch.advantages,
                "old_per_token_logps": batch.old_logprob,
            }
            return GRPOTrainer._compute_loss(trainer, None, batch_of_trl), []

        return differentiate(batch.logprob, loss_of)

    return compute


def build(args: Namespace) -> Case:
    first = make_inputs(args)
    copies = [first, *(first.copy() for _ in range(COPIES - 1))]
    kind, on_gpu = dispatch.resolve(args.impl, args.device), args.device.type == "cuda"
    exact, bar = plain(first, torch.float64), plain(first)
    judge = Check(exact, bar)
    batch = padded(first)
    unpadded = Check(exact, bar, lambda tensor: tensor[batch.mask.bool()] if tensor.ndim == 2 else tensor)
    half = first.bytes_moved // 2
    buffers = [[torch.zeros(half, dtype=torch.uint8, device=args.device) for _ in range(2)] for _ in copies]
    alone = dispatch.implementation("policy_loss", args.impl, args.device)

    def bare(*tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return alone(
            *tensors,
            objective=Objective("ppo", CLIP_LOW, CLIP_HIGH, 0.0),
            aggregation="token_mean",
            denominator=None,
            ref_logprob=None,
            kl_coef=0.0,
            kl_estimator="k3",
            entropy=None,
            entropy_coef=0.0,
            weights=None,
        )

    def public(*tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        bounds = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
        return policy_loss(*tensors, kind="ppo", aggregation="token_mean", impl=args.impl, **bounds)

    def copy(i: int) -> Results:
        return {"copy": buffers[i][0].copy_(buffers[i][1])}

    def contender(key: str, name: str, compute: Callable[[Inputs], Results], computes: str = LOGGED) -> Contender:
        return Contender(key, name, computes, lambda: lambda i: compute(copies[i]), check=judge)

    def on_padded(key: str, name: str, computes: str, missing: str, prepare: Callable[[], LossOfPadded]) -> Contender:
        """Always on the same batch: what caches hold of it is to the advantage of the others."""

        def prepared() -> Run:
            compute = prepare()
            return lambda _: compute(batch)

        return Contender(key, name, computes, prepared, missing, unpadded)

    no_liger, no_trl = not_installed("liger_kernel", "liger-kernel"), not_installed("trl", "trl")
    contenders = [
        contender("ours", f"retrain ({kind}), alone", lambda inputs: ours(inputs, bare)),
        contender("public", f"retrain ({kind}), public call", lambda inputs: ours(inputs, public), f"{LOGGED}; checks"),
        contender("plain", "PyTorch", plain),
        on_padded("liger", "Liger, padded", "loss, share clipped; gradient", no_liger, lambda: liger(on_gpu)),
        on_padded("trl", "TRL, padded", "loss, shares clipped; gradient", no_trl, trl),
        Contender("copy", "device copy", f"reads and writes {half:,} bytes", lambda: copy),
    ]
    shape = {"N": args.tokens, "B": args.completions}
    settings = {"impl": kind, "bytes_moved": first.bytes_moved, "padded_to": batch.mask.shape[1]}
    return Case(shape, torch.float32, contenders, targets_of(args), settings, short=True)


def targets_of(args: Namespace) -> Callable[[Mapping[str, Entry]], list[Target]]:
    """Stated for a GPU, and for the many tokens that it takes to keep one busy."""

    def of_many_tokens(entries: Mapping[str, Entry]) -> list[Target]:
        return [Target("time over a copy of the bytes it must move", time_ratio(entries, "ours", "copy"), 2.0)]

    return of_many_tokens if args.device.type == "cuda" and args.tokens >= FLAGS["tokens"][1] else lambda _: []


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__ or "", FLAGS, argv)
    return compare("policy_loss", build(args), args)


if __name__ == "__main__":
    sys.exit(main())
