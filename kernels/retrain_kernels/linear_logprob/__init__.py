"""linear_logprob: log-probability of one token and entropy of the next-token distribution, from hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retrain_kernels import checks, dispatch


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution softmax((hidden weight^T + bias) / temperature).

    hidden: [N, D], weight: [V, D], bias: [V] or None; float64, float32, bfloat16 or float16, and dtypes may differ.
    targets: [N] int32 or int64, each in [0, V). N = 0 is legal. Logits must be finite.
    Returns (logprob [N], entropy [N]) in nats, float32 (float64 if an input is float64).

    Both outputs are differentiable once with respect to hidden, and to weight and bias where they require it.
    entropy_grad: False makes the entropy a constant; the gradient of the log-prob to hidden then costs a matrix product
    less. No [N, V] tensor is ever held; products accumulate in float32 (float64) whatever the dtype of the inputs.
    Raises TypeError or ValueError naming the argument, RuntimeError where impl cannot run. Derivation: README.md.
    """
    checks.check_tensor("hidden", hidden, {"N": None, "D": None})
    n, d = hidden.shape
    checks.check_tensor("weight", weight, {"V": None, "D": d}, like=hidden)
    vocab = weight.shape[0]
    if vocab == 0:
        raise ValueError("weight must have at least one row (V >= 1), got shape [0, D]")
    checks.check_tensor("targets", targets, {"N": n}, kind="integer", like=hidden)
    if bias is not None:
        checks.check_tensor("bias", bias, {"V": vocab}, like=hidden)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    _check_targets(targets, vocab)
    float64 = torch.float64 in (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    compute = dispatch.implementation("linear_logprob", impl, hidden.device, float64=float64)
    return compute(hidden, weight, targets, bias, temperature, entropy_grad)


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(targets)).tolist()
    if low < 0 or high >= vocab:
        raise ValueError(f"targets must lie in [0, {vocab}), got {low if low < 0 else high}")
