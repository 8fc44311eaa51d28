"""linear_logprob in plain PyTorch: rows are taken a chunk at a time, and backward recomputes their logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at once (16 MiB in float32). A small vocabulary's whole micro-batch fits, a large one's never does.
CHUNK_ELEMENTS = 2**22


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """See retrain_kernels.linear_logprob; arguments are already checked."""
    return _LinearLogprob.apply(hidden, weight, targets.long(), bias, 1.0 / temperature)  # type: ignore[return-value]


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and two numbers a row (log-partition and entropy), never logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, inverse_temperature: float
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden, weight, bias)
        logprob, entropy, log_partition = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        # Autocast would turn the float32 products back into low precision.
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, inverse_temperature, dtype)
            for rows in _chunks(len(hidden), len(weight)):
                logits = head.logits(hidden[rows])
                top = logits.amax(dim=1, keepdim=True)
                shifted = logits.sub_(top)
                target = shifted.gather(1, targets[rows, None])
                exp = shifted.exp()
                total = exp.sum(dim=1, keepdim=True)
                log_total = total.log()
                logprob[rows] = (target - log_total).squeeze(1)
                # H = log Z - sum(p z), with z shifted so that the largest is 0: no cancellation of large logits.
                entropy[rows] = (log_total - shifted.mul_(exp).sum(dim=1, keepdim=True) / total).squeeze(1)
                log_partition[rows] = (top + log_total).squeeze(1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, bias, log_partition, entropy)
        ctx.inverse_temperature = inverse_temperature
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, log_partition, entropy = ctx.saved_tensors
        grad_logprob, grad_entropy = grads
        dtype = log_partition.dtype
        need_hidden, need_weight, _, need_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(log_partition)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, ctx.inverse_temperature, dtype)
            for rows in _chunks(len(hidden), len(weight)):
                grad_logits = _grad_logits(
                    head.logits(hidden[rows]).sub_(log_partition[rows, None]),
                    targets[rows, None],
                    grad_logprob[rows, None],
                    None if grad_entropy is None else grad_entropy[rows, None],
                    entropy[rows, None],
                )
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits.mm(head.weight).mul_(head.scale).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.t(), hidden[rows].to(dtype), alpha=head.scale)
                if grad_bias is not None:
                    grad_bias.add_(grad_logits.sum(dim=0), alpha=head.scale)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


class _Head:
    """The output projection in the compute dtype; `scale` is 1 / temperature."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.scale = scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered logits [n, V] of a chunk of rows [n, D]; the scaling rides on the matrix product."""
        rows = hidden.to(self.weight.dtype)
        if self.bias is None:
            # beta = 0 tells the product to ignore its first operand.
            return torch.addmm(rows.new_zeros(1), rows, self.weight.t(), beta=0, alpha=self.scale)
        return torch.addmm(self.bias, rows, self.weight.t(), beta=self.scale, alpha=self.scale)


def _grad_logits(
    log_p: Tensor, targets: Tensor, grad_logprob: Tensor, grad_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """d loss / d tempered logits [n, V] = g_l (onehot - p) - g_H p (log p + H); overwrites log_p [n, V]."""
    p = log_p.exp()
    if grad_entropy is None:
        grad = p.mul_(-grad_logprob)
    else:
        grad = p.mul_(log_p.add_(entropy).mul_(-grad_entropy).sub_(grad_logprob))
    return grad.scatter_add_(1, targets, grad_logprob)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: low precision never accumulates in low precision."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab)
    return (slice(start, start + size) for start in range(0, rows, size))
