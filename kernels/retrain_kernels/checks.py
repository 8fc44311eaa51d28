"""Argument checks shared by the operations: every message names the argument, what it must be and what it is.

A check that reads values (ranges, monotonicity) waits for the device once; shape and dtype checks are free.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["floating", "integer", "bool"]

_INTEGERS = (torch.int32, torch.int64)


def check_tensor(
    name: str, tensor: object, shape: dict[str, int | None], *, kind: Kind = "floating", like: Tensor | None = None
) -> None:
    """Check type, kind of dtype, shape and device.

    shape maps each dimension's name to its size, or to None where any size will do: {"N": None, "D": 64}.
    like: a tensor on the device this one has to be on.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not _is_kind(tensor, kind):
        raise TypeError(f"{name} must have {_KIND_NAMES[kind]} dtype, got {tensor.dtype}")
    wanted = list(shape.values())
    if tensor.ndim != len(wanted) or any(
        size is not None and size != got for size, got in zip(wanted, tensor.shape, strict=True)
    ):
        text = ", ".join(dim if size is None else f"{dim}={size}" for dim, size in shape.items())
        raise ValueError(f"{name} must have shape [{text}], got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {like.device}")


_KIND_NAMES: dict[Kind, str] = {"floating": "a floating-point", "integer": "an int32 or int64", "bool": "a bool"}


def _is_kind(tensor: Tensor, kind: Kind) -> bool:
    if kind == "floating":
        return tensor.is_floating_point()
    return tensor.dtype in _INTEGERS if kind == "integer" else tensor.dtype == torch.bool


def check_cu_seqlens(cu_seqlens: object, num_tokens: int, *, like: Tensor) -> None:
    """Check that cu_seqlens [B + 1] starts at 0, never falls and ends at num_tokens (empty completions are legal)."""
    check_tensor("cu_seqlens", cu_seqlens, {"B + 1": None}, kind="integer", like=like)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens must have shape [B + 1] and hold at least the leading 0, got an empty tensor")
    wrong = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != num_tokens) | (cu_seqlens[1:] < cu_seqlens[:-1]).any()
    if wrong.item():
        raise ValueError(
            f"cu_seqlens must start at 0, never decrease and end at the number of tokens ({num_tokens}), "
            f"got {cu_seqlens.tolist()}"
        )


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check that value is one of the names in choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(name: str, value: float, *, low: float = 0.0, high: float = math.inf) -> None:
    """Check that value is a finite number in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        interval = f"a finite number >= {low}" if math.isinf(high) else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {interval}, got {value}")


def check_finite(name: str, values: Tensor) -> None:
    """Check that every element of a vector is finite; the message names the first that is not."""
    finite = torch.isfinite(values)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, got {values[index].item()} at index {index}")
