"""Log-prob and entropy from hidden states, forward and backward: ours against PyTorch, Liger and TRL.

    python kernels/benchmarks/linear_logprob.py --json linear_logprob.json

The loss is that of the first, on-policy step of GRPO: -mean(A exp(l - sg[l])) with one advantage a sequence. The head
is frozen, as with LoRA, and the entropy a constant, as without an entropy bonus.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from harness import (
    Case,
    Check,
    Contender,
    Entry,
    Results,
    Run,
    Target,
    compare,
    memory_ratio,
    not_installed,
    parse,
    time_ratio,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retrain_kernels import dispatch, linear_logprob

LogProb = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FLAGS = {
    "rows": (256, 8192, "tokens N"),
    "hidden": (64, 2560, "hidden size D"),
    "vocab": (151936, 151936, "vocabulary V"),
    "chunk-rows": (64, 1024, "rows that torch chunked takes at a time"),
}
LARGE_VOCABULARY = 100_000
# Rows that are compared with float64.
CHECKED_ROWS = 64
# Liger computes up to this many tokens of a sequence at once, and one sequence at a time: longer ones suit it best.
LIGER_TOKENS = 2048
BOTH = "log-prob, entropy; gradient to hidden"


@dataclass(frozen=True)
class Inputs:
    """hidden [N, D], weight [V, D], targets [N]; advantages [B], one for every N / B rows: a sequence."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor

    @property
    def of_rows(self) -> Tensor:
        return self.advantages.repeat_interleave(len(self.hidden) // len(self.advantages))


def make_inputs(args: Namespace) -> Inputs:
    """Logits of standard deviation 3, about as wide as a language model's."""
    generator = torch.Generator(args.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=args.dtype, device=args.device).normal_(generator=generator)

    tokens = next(t for t in range(min(LIGER_TOKENS, args.rows), 0, -1) if args.rows % t == 0)
    return Inputs(
        hidden=normal(args.rows, args.hidden),
        weight=normal(args.vocab, args.hidden).mul_(3 / args.hidden**0.5),
        targets=torch.randint(args.vocab, (args.rows,), device=args.device, generator=generator),
        advantages=torch.randn(args.rows // tokens, device=args.device, generator=generator),
    )


def on_policy_loss(logprob: Tensor, advantages: Tensor, rows: int) -> Tensor:
    return -(advantages * (logprob - logprob.detach()).exp()).sum() / rows


def forward_backward(compute: LogProb, inputs: Inputs) -> Results:
    hidden = inputs.hidden.detach().requires_grad_()
    logprob, entropy = compute(hidden, inputs.weight, inputs.targets)
    (grad,) = torch.autograd.grad(on_policy_loss(logprob, inputs.of_rows, len(hidden)), hidden)
    return {"logprob": logprob.detach(), "entropy": entropy.detach(), "grad_hidden": grad}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All the logits, in the dtype of the inputs; the softmax of low-precision logits in float32, as trainers do it."""
    logits = F.linear(hidden, weight)
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logprob = log_p.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logprob, entropy


def chunked(rows: int) -> LogProb:
    """As `plain`, some rows at a time: backward computes a chunk's logits again, and no more of it than it needs."""

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            cast(tuple[Tensor, Tensor], checkpoint(plain, h, weight, t, use_reentrant=False, preserve_rng_state=False))
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    return compute


def trl_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-prob and entropy of TRL's GRPOTrainer: its chunked head, with the chunk size it takes there."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    outputs = ("log_probs", "entropy")
    results = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, columns, None, 1.0, outputs)
    logprob, entropy, *_ = cast(Any, results)
    return logprob, entropy


def trl_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's functions for logits that are there already."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(F.linear(hidden, weight), targets, entropy_requires_grad=False)


def liger(inputs: Inputs) -> Run:
    """Liger's fused linear GRPO loss on the same sequences; it computes gradients in its forward pass."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=inputs.hidden.is_cuda)
    sequences = len(inputs.advantages)
    targets = inputs.targets.view(sequences, -1)
    others = inputs.weight, targets, torch.ones_like(targets), inputs.advantages

    def run(_: int) -> Results:
        hidden = inputs.hidden.detach().requires_grad_()
        loss, _metrics = loss_of(hidden.view(sequences, -1, hidden.shape[1]), *others)
        return {"grad_hidden": torch.autograd.grad(loss, hidden)[0]}

    return run


def products(inputs: Inputs) -> Run:
    """The products that recomputing takes: logits, logits again, and the gradient from them."""
    logits = torch.empty(len(inputs.hidden), len(inputs.weight), dtype=inputs.hidden.dtype, device=inputs.hidden.device)
    grad = torch.empty_like(inputs.hidden)

    def run(_: int) -> Results:
        torch.mm(inputs.hidden, inputs.weight.t(), out=logits)
        torch.mm(inputs.hidden, inputs.weight.t(), out=logits)
        torch.mm(logits, inputs.weight, out=grad)
        return {}

    return run


def check(inputs: Inputs) -> Check:
    """float64 and plain PyTorch on rows spread over the batch: a row's results depend on no other."""
    count = len(inputs.hidden)
    rows = torch.linspace(0, count - 1, min(count, CHECKED_ROWS), device=inputs.hidden.device).long()
    part = Inputs(inputs.hidden[rows], inputs.weight, inputs.targets[rows], inputs.of_rows[rows])
    exact = Inputs(part.hidden.double(), part.weight.double(), part.targets, part.advantages.double())
    share = len(rows) / count  # the loss is a mean over all rows

    def scaled(results: Results) -> Results:
        return results | {"grad_hidden": results["grad_hidden"] * share}

    return Check(
        scaled(forward_backward(plain, exact)), scaled(forward_backward(plain, part)), lambda tensor: tensor[rows]
    )


def build(args: Namespace) -> Case:
    inputs = make_inputs(args)
    kind = dispatch.resolve(args.impl, args.device)
    judge = check(inputs)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, entropy_grad=False, impl=args.impl)

    def contender(key: str, name: str, compute: LogProb, missing: str = "") -> Contender:
        return Contender(key, name, BOTH, lambda: lambda _: forward_backward(compute, inputs), missing, judge)

    no_trl = not_installed("trl", "trl")
    contenders = [
        contender("ours", f"retrain ({kind})", ours),
        contender("plain", "PyTorch, all logits", plain),
        contender("chunked", "PyTorch, chunked", chunked(args.chunk_rows)),
        Contender(
            "liger",
            "Liger fused linear GRPO",
            "loss; gradient to hidden (no log-prob, no entropy)",
            lambda: liger(inputs),
            not_installed("liger_kernel", "liger-kernel"),
            judge,
        ),
        contender("trl", "TRL fused head", trl_fused, no_trl),
        contender("trl_logits", "TRL on all logits", trl_logits, no_trl),
        Contender("products", "three products", "logits twice, gradient once; nothing else", lambda: products(inputs)),
    ]
    shape = {"N": args.rows, "D": args.hidden, "V": args.vocab}
    settings = {"chunk_rows": args.chunk_rows, "sequences": len(inputs.advantages), "impl": kind}
    return Case(shape, args.dtype, contenders, targets_of(args), settings)


def targets_of(args: Namespace) -> Callable[[Mapping[str, Entry]], list[Target]]:
    """On a GPU the targets are stated for one shape, on a CPU for large vocabularies."""

    def on_gpu(entries: Mapping[str, Entry]) -> list[Target]:
        peak = entries["ours"].peak_bytes
        return [
            Target("peak memory over inputs and outputs, GB", None if peak is None else peak / 1e9, 0.5),
            Target("time over the three products", time_ratio(entries, "ours", "products"), 1.3),
            Target("time over Liger's", time_ratio(entries, "ours", "liger"), 1.0),
            Target("time over PyTorch chunked", time_ratio(entries, "ours", "chunked"), 0.5),
        ]

    def on_cpu(entries: Mapping[str, Entry]) -> list[Target]:
        return [
            Target("peak memory over that of all logits", memory_ratio(entries, "ours", "plain"), 0.25),
            Target("time over that of all logits", time_ratio(entries, "ours", "plain"), 1.0),
        ]

    if args.device.type == "cpu":
        return on_cpu if args.vocab >= LARGE_VOCABULARY else lambda _: []
    stated = all(getattr(args, name) == FLAGS[name][1] for name in ("rows", "hidden", "vocab"))
    return on_gpu if stated and args.dtype == torch.bfloat16 else lambda _: []


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__ or "", FLAGS, argv)
    return compare("linear_logprob", build(args), args)


if __name__ == "__main__":
    sys.exit(main())
