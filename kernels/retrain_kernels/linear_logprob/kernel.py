"""linear_logprob in Triton: logits exist one tile at a time, in registers; here the launches and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from retrain_kernels import dispatch
from retrain_kernels.linear_logprob import programs

# Rows that go through at once. It bounds what a tile leaves behind (forward) and the float32 sum (backward).
MAX_ROWS = 16384
# Elements of d loss / d logits held at once in backward: 128 MiB in bfloat16, and wide enough for full-speed products.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Tiles:
    """Launch shape: a program computes `rows` x `vocab` logits, `depth` of D at a time.

    band: tiles of rows that are computed before the next column of the vocabulary: their rows stay in the L2 cache.
    """

    rows: int
    vocab: int
    depth: int
    warps: int
    stages: int
    band: int = 16


LARGE = Tiles(
    rows=128, vocab=256, depth=64, warps=8, stages=4
)  # 144 (Ampere) or 192 KiB of shared memory: A100, H100, B200
SMALL = Tiles(rows=128, vocab=128, depth=32, warps=8, stages=2)  # 32 KiB: consumer cards, MI300
FLOAT32 = Tiles(rows=64, vocab=64, depth=32, warps=4, stages=2)  # without tensor cores registers are what is short


def tiles_for(dtype: torch.dtype, width: int, shared_memory: int) -> Tiles:
    """Launch shape for rows of `width` in `dtype` on a device with that many bytes of shared memory a block."""
    if dtype == torch.float32:
        return FLOAT32
    # Masked loads at the end of an odd width leave no registers for the large tile.
    return LARGE if shared_memory >= 160 * 1024 and width % LARGE.depth == 0 else SMALL


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return cast(Any, triton.runtime.driver.active).utils.get_device_properties(device.index)["max_shared_mem"]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    entropy_grad: bool,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """See retrain_kernels.linear_logprob; arguments are already checked. tiles: None takes those of the device."""
    hidden, weight = _row_major(hidden), _row_major(weight)
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    tiles = tiles or tiles_for(dtype, hidden.shape[1], _shared_memory(hidden.device))
    head = _Head(weight, bias, 1.0 / temperature, dtype, tiles)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    # float16 cannot hold p / p_target of an improbable target.
    if torch.is_grad_enabled() and hidden.requires_grad and frozen and not entropy_grad and dtype != torch.float16:
        ahead = _ahead(head, hidden.detach(), targets)
        if ahead is not None:
            return _WithSlope.apply(hidden, *ahead)  # type: ignore[return-value]
    logprob, entropy = _LinearLogprob.apply(hidden, weight, targets, bias, head)  # type: ignore[misc]
    return logprob, entropy if entropy_grad else entropy.detach()


class _WithSlope(torch.autograd.Function):
    """Log-prob and entropy that are there already; the log-prob with its gradient, the entropy a constant.

    slope: d logprob / d hidden [N, D]. An incoming gradient only scales its rows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logprob: Tensor, entropy: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slope)
        logprob, entropy = logprob.clone(), entropy.clone()
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grad_logprob[:, None]).to(slope.dtype), None, None, None


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and three numbers a row (largest logit, log-partition above it, entropy), never logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: _Head
    ) -> tuple[Tensor, Tensor]:
        logprob, entropy, largest, log_total = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(4)
        )
        with dispatch.on_device(hidden.device):
            for rows in _slices(len(hidden), MAX_ROWS):
                results = [x[rows] for x in (logprob, entropy, largest, log_total)]
                _forward_rows(head, hidden[rows], targets[rows], results)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, bias, largest, log_total, entropy)
        ctx.rest = (head.scale, head.dtype, head.tiles)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, largest, log_total, entropy = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        head = _Head(weight, bias, *ctx.rest)
        cotangents = [torch.zeros_like(entropy) if grad is None else grad.float() for grad in grads]
        # d loss / d logits is often 1e-6 and less; in units of a power of two a row it stays in float16's range.
        unit = torch.stack(cotangents).abs().amax(0).log2().floor().clamp(-120, 120).exp2()
        top = unit.amax() if len(unit) else unit.new_ones(())
        # Autocast would turn float32 products into low precision.
        with dispatch.on_device(hidden.device), torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(len(hidden), MAX_ROWS):
                per_row = [x[rows] for x in (targets, largest, log_total, entropy, *(g / unit for g in cotangents))]
                total = None if grad_hidden is None else torch.zeros_like(hidden[rows], dtype=torch.float32)
                for columns, grad_logits in _grad_logits(head, hidden[rows], per_row):
                    if total is not None:
                        _add_product(total, grad_logits, weight[columns].to(head.dtype))
                    if need_weight or need_bias:
                        grad_logits.mul_((unit[rows] / top)[:, None])
                    if grad_weight is not None:
                        _add_product(grad_weight[columns], grad_logits.t(), hidden[rows].to(head.dtype))
                    if grad_bias is not None:
                        grad_bias[columns] += grad_logits.sum(0, dtype=torch.float32)
                if grad_hidden is not None and total is not None:
                    grad_hidden[rows] = total.mul_((unit[rows] * head.scale)[:, None])
        grad_weight, grad_bias = (
            None if total is None else total.mul_(top * head.scale).to(like.dtype)
            for total, like in ((grad_weight, weight), (grad_bias, bias))
        )
        return grad_hidden, grad_weight, None, grad_bias, None


@dataclass(frozen=True)
class _Head:
    """The output projection. scale: 1 / temperature; dtype: that of the products' operands (they sum in float32)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    dtype: torch.dtype
    tiles: Tiles

    def launch(self, kernel: Any, hidden: Tensor, first: int, last: int, *args: Any) -> None:
        """Run `kernel` on every tile of hidden's rows and of the vocabulary from `first` up to `last`."""
        tiles = self.tiles
        grid = (triton.cdiv(len(hidden), tiles.rows) * triton.cdiv(last - first, tiles.vocab),)
        kernel[grid](
            hidden,
            self.weight,
            self.bias,
            *args,
            len(hidden),
            first,
            last,
            hidden.shape[1],
            hidden.stride(0),
            self.weight.stride(0),
            self.scale,
            EVEN_DEPTH=hidden.shape[1] % tiles.depth == 0,
            DOT_DTYPE=_dot_dtype(self.dtype),
            # As torch.mm does it: TF32 only where the user has allowed it.
            PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            ROWS=tiles.rows,
            VOCAB=tiles.vocab,
            DEPTH=tiles.depth,
            BAND=tiles.band,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def launch_rows(self, kernel: Any, hidden: Tensor, *args: Any) -> None:
        """Run `kernel` on blocks of hidden's rows."""
        n, depth = hidden.shape
        strides = hidden.stride(0), self.weight.stride(0)
        rows = 16
        kernel[(triton.cdiv(n, rows),)](
            hidden, self.weight, self.bias, *args, n, depth, *strides, self.scale, ROWS=rows, DEPTH=128, num_warps=4
        )


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    # The interpreter would multiply the bits of bfloat16 as integers. In float32 the products are the same numbers.
    if dtype == torch.float32 or dispatch.interpreting():
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def _forward_rows(head: _Head, hidden: Tensor, targets: Tensor, results: list[Tensor]) -> None:
    """Fill the four results [n], of `programs.merge`: statistics a tile of the vocabulary, then their merge."""
    n, vocab = len(hidden), len(head.weight)
    count = triton.cdiv(vocab, head.tiles.vocab)
    statistics = torch.empty(3, count, n, dtype=torch.float32, device=hidden.device)
    target_logit = torch.empty_like(results[0])
    head.launch(programs.statistics, hidden, 0, vocab, targets, statistics, target_logit)
    block, merge = 32, cast(Any, programs.merge)
    merge[(triton.cdiv(n, block),)](statistics, target_logit, *results, n, count, ROWS=block, TILES=32, num_warps=4)


@torch.no_grad()
def _ahead(head: _Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Log-prob, entropy and d logprob / d hidden, from p_j / p_target: two products, where recomputing takes three.

    None where a target is so improbable that the ratios overflow.
    """
    logprob, entropy = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    slope = torch.empty_like(hidden)
    with dispatch.on_device(hidden.device), torch.autocast(hidden.device.type, enabled=False):
        for rows in _slices(len(hidden), MAX_ROWS):
            others, moment, total = _odds(head, hidden[rows], targets[rows])
            if not (others.isfinite() & moment.isfinite()).all():
                return None
            logprob[rows] = -others.log1p()
            entropy[rows] = others.log1p() - moment / (1 + others)
            # (1 - p_y) w_y - sum of the other p_j w_j: no difference of equals where the target is nearly certain.
            total.neg_().addcmul_(others[:, None], head.weight[targets[rows].long()].float())
            slope[rows] = total.mul_((head.scale / (1 + others))[:, None])
    return logprob, entropy, slope


def _odds(head: _Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With e_j = p_j / p_target, sums over all j but the target: of e_j and e_j log e_j [n], of e_j w_j [n, D]."""
    n, vocab = len(hidden), len(head.weight)
    count = triton.cdiv(vocab, head.tiles.vocab)
    target_logit = torch.empty(n, dtype=torch.float32, device=hidden.device)
    head.launch_rows(programs.target_logits, hidden, targets, target_logit)
    sums = torch.empty(2, count, n, dtype=torch.float32, device=hidden.device)
    total = torch.zeros(n, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for columns, e in _chunks(head, n, hidden.device):
        head.launch(
            programs.odds, hidden, columns.start, columns.stop, targets, target_logit, sums, count, e, e.stride(0)
        )
        _add_product(total, e, head.weight[columns].to(head.dtype))
    others, moment = sums.sum(1)
    return others, moment, total


def _grad_logits(head: _Head, hidden: Tensor, per_row: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with d loss / d tempered logits [n, width] in the dtype of the products.

    per_row: targets, largest logit, log-total, entropy and the two cotangents [n]. The next slice overwrites the last.
    """
    for columns, grad in _chunks(head, len(hidden), hidden.device):
        head.launch(programs.grad_logits, hidden, columns.start, columns.stop, *per_row, grad, grad.stride(0))
        yield columns, grad


def _chunks(head: _Head, n: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with a matrix [n, width] to fill, all in the same memory."""
    vocab, step = len(head.weight), head.tiles.vocab
    width = min(triton.cdiv(vocab, step), max(1, CHUNK_ELEMENTS // (n * step))) * step
    buffer = torch.empty(n * width, dtype=head.dtype, device=device)
    for columns in _slices(vocab, width):
        yield columns, buffer[: n * (columns.stop - columns.start)].view(n, -1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in float32 without a float32 copy of a or b where the device can."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _row_major(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
