"""linear_logprob in plain PyTorch: logits exist a tile at a time, some rows by some columns of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at once, in two buffers of 2 MiB in float32: about what a CPU core's caches hold. On other devices the
# number of operations sets the pace, and tiles are larger.
CHUNK_ELEMENTS = 2**19
ACCELERATOR_FACTOR = 8
# A product of few rows reads the whole weight for little work, so a tile has this many where there are as many. Its
# columns are bounded too, because a low-precision weight is cast to float32 a tile at a time.
TILE_ROWS = 1024
TILE_COLUMNS = 4096


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """See retrain_kernels.linear_logprob; arguments are already checked."""
    targets = targets.long()
    head = _Head(weight, bias, 1.0 / temperature, _compute_dtype(hidden, weight, bias))
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if torch.is_grad_enabled() and hidden.requires_grad and frozen and not entropy_grad:
        with torch.no_grad():
            logprob, entropy, _, slope = _forward(head, hidden, targets, with_slope=True)
        return _WithSlope.apply(hidden, logprob, slope), entropy  # type: ignore[return-value]
    logprob, entropy = _LinearLogprob.apply(hidden, weight, targets, bias, head)  # type: ignore[misc]
    return logprob, entropy if entropy_grad else entropy.detach()


class _WithSlope(torch.autograd.Function):
    """A log-prob that is there already, with its gradient: slope [N, D] is d logprob / d hidden.

    An incoming gradient only scales the rows of slope, so forward takes it along while it has the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logprob: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = hidden.dtype
        return logprob.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grad_logprob[:, None]).to(ctx.dtype), None, None


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and two numbers a row (log-partition and entropy), never logits: backward recomputes them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: _Head
    ) -> tuple[Tensor, Tensor]:
        logprob, entropy, log_partition, _ = _forward(head, hidden, targets, with_slope=False)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, bias, log_partition, entropy)
        ctx.scale = head.scale
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
        head = _Head(weight, bias, ctx.scale, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _row_blocks(hidden):
                states = hidden[rows].to(dtype)
                gradient = torch.zeros_like(states)
                for columns, weights, logits, spare in head.tiles(states):
                    grad_logits = _grad_logits(
                        logits.sub_(log_partition[rows, None]),
                        spare,
                        *_locate(targets[rows, None], columns),
                        grad_logprob[rows, None],
                        None if grad_entropy is None else grad_entropy[rows, None],
                        entropy[rows, None],
                    )
                    if grad_hidden is not None:
                        gradient.addmm_(grad_logits, weights, alpha=head.scale)
                    if grad_weight is not None:
                        grad_weight[columns].addmm_(grad_logits.t(), states, alpha=head.scale)
                    if grad_bias is not None:
                        grad_bias[columns].add_(grad_logits.sum(dim=0), alpha=head.scale)
                if grad_hidden is not None:
                    grad_hidden[rows] = gradient.to(hidden.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _forward(
    head: _Head, hidden: Tensor, targets: Tensor, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy and log-partition [N], and where asked d logprob / d hidden [N, D], in the compute dtype."""
    logprob, entropy, log_partition = (hidden.new_empty(len(hidden), dtype=head.dtype) for _ in range(3))
    slope = torch.zeros_like(hidden, dtype=head.dtype) if with_slope else None
    # Autocast would turn the float32 products back into low precision.
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _row_blocks(hidden):
            part = None if slope is None else slope[rows]
            numbers = _summarise(head, hidden[rows].to(head.dtype), targets[rows, None], part)
            logprob[rows], entropy[rows], log_partition[rows] = (x.squeeze(1) for x in numbers)
    return logprob, entropy, log_partition, slope


class _Head:
    """The output projection in the compute dtype, a tile at a time; `scale` is 1 / temperature."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> None:
        self.weight = weight
        self.bias = None if bias is None else bias.to(dtype)
        self.scale = scale
        self.dtype = dtype

    def tiles(self, states: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """For the rows [n, D]: columns, their weights [v, D], tempered logits [n, v], and a buffer of that shape.

        The scaling rides on the matrix product. Logits and buffer are the caller's until the next tile.
        """
        count, vocab = len(states), len(self.weight)
        width = min(vocab, TILE_COLUMNS, max(1, _chunk_elements(states) // count))
        storage, spare = (states.new_empty(count * width) for _ in range(2))
        nothing = states.new_zeros(1)
        for columns in _slices(vocab, width):
            weights = self.weight[columns].to(self.dtype)
            size = count * len(weights)
            logits = storage[:size].view(count, -1)
            if self.bias is None:
                # beta = 0 tells the product to ignore its first operand.
                torch.addmm(nothing, states, weights.t(), beta=0, alpha=self.scale, out=logits)
            else:
                torch.addmm(self.bias[columns], states, weights.t(), beta=self.scale, alpha=self.scale, out=logits)
            yield columns, weights, logits, spare[:size].view(count, -1)


def _summarise(head: _Head, states: Tensor, targets: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log-partition [n, 1] of the rows [n, D]; adds d logprob / d row to slope [n, D], zeros.

    Sums over the vocabulary run online, relative to the largest logit so far. The target joins them last, so that
    (1 - p_y) w_y - sum of the other p_j w_j is no difference of equals where the token is nearly certain.
    """
    # Stands in for minus infinity, whose difference with itself and product with 0 are no numbers.
    lowest = torch.finfo(states.dtype).min / 4
    top = torch.full_like(targets, lowest, dtype=states.dtype)
    chosen, total, total_z = torch.empty_like(top), torch.zeros_like(top), torch.zeros_like(top)
    for columns, weights, logits, exp in head.tiles(states):
        inside, position = _locate(targets, columns)
        logit = logits.gather(1, position)
        chosen = torch.where(inside, logit, chosen)
        logits.scatter_(1, position, logit.masked_fill(inside, 2 * lowest))
        top, total, total_z, decay = _shift(top, logits.amax(dim=1, keepdim=True), total, total_z)
        torch.exp(logits.sub_(top), out=exp)
        if slope is not None:
            slope.mul_(decay).addmm_(exp, weights)
        total = total + exp.sum(dim=1, keepdim=True)
        total_z = total_z + exp.mul_(logits).sum(dim=1, keepdim=True)
    top, others, total_z, decay = _shift(top, chosen, total, total_z)
    shifted = chosen - top
    target = shifted.exp()
    total = others + target
    log_total = total.log()
    if slope is not None:
        slope.mul_(-decay).addcmul_(others, head.weight[targets.squeeze(1)].to(head.dtype)).mul_(head.scale / total)
    # H = log Z - sum(p z), with z shifted so that the largest is 0: no cancellation of large logits.
    return shifted - log_total, log_total - (total_z + target * shifted) / total, top + log_total


def _shift(top: Tensor, found: Tensor, total: Tensor, total_z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new largest logit; sum exp(z) and sum z exp(z) relative to it instead of `top`; exp(top - new)."""
    new = torch.maximum(top, found)
    change = top - new
    decay = change.exp()
    return new, total * decay, (total_z + change * total) * decay, decay


def _grad_logits(
    log_p: Tensor,
    spare: Tensor,
    inside: Tensor,
    position: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor,
) -> Tensor:
    """d loss / d tempered logits [n, v] = g_l (onehot - p) - g_H p (log p + H); overwrites log_p and spare [n, v]."""
    p = torch.exp(log_p, out=spare)
    if grad_entropy is None:
        grad = p.mul_(-grad_logprob)
    else:
        grad = p.mul_(log_p.add_(entropy).mul_(-grad_entropy).sub_(grad_logprob))
    return grad.scatter_add_(1, position, grad_logprob.masked_fill(~inside, 0.0))


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target [n, 1] is in a tile, and where: its position, or any legal one for a target that is not."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, (targets - columns.start).masked_fill(~inside, 0)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: low precision never accumulates in low precision."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunk_elements(tensor: Tensor) -> int:
    return CHUNK_ELEMENTS if tensor.device.type == "cpu" else CHUNK_ELEMENTS * ACCELERATOR_FACTOR


def _row_blocks(hidden: Tensor) -> Iterator[slice]:
    return _slices(len(hidden), min(TILE_ROWS, _chunk_elements(hidden)))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
