"""The packed layout: B completions one after another; completion i owns tokens cu_seqlens[i]:cu_seqlens[i + 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Tokens of each completion: [B], int64."""
    return (cu_seqlens[1:] - cu_seqlens[:-1]).long()


def owner_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The completion that each token belongs to: [N], int64."""
    lengths = lengths_of(cu_seqlens)
    return torch.repeat_interleave(lengths, output_size=num_tokens)


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """float64 where the device has it: sums over a long completion or a large batch then carry no visible error."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def segment_sum(values: Tensor, owner: Tensor, segments: int) -> Tensor:
    """Sum the values [N] of each segment: [segments], in the accumulator dtype; an empty segment sums to 0."""
    dtype = accumulator_dtype(values)
    return torch.zeros(segments, dtype=dtype, device=values.device).index_add(0, owner, values.to(dtype))
