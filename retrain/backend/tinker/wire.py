"""This project's values as the SDK's types, and back. The SDK is imported where it is used: it may not be there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from retrain.backend.tinker.datums import Datum
    from retrain.config import Config, LossConfig

# Names under which services report the norm of the gradient, before it is clipped.
GRAD_NORMS = ("grad_norm", "grad_l2")


def prompt(tokens: np.ndarray) -> Any:
    from tinker import types

    return types.ModelInput.from_ints(tokens.tolist())


def datum(datum: Datum, *, with_weights: bool) -> Any:
    """with_weights: for a service that divides by their sum."""
    from tinker import types

    arrays = {"target_tokens": datum.targets, "logprobs": datum.logprobs, "advantages": datum.advantages}
    if with_weights:
        arrays["weights"] = datum.weights
    inputs = {name: types.TensorData.from_numpy(values) for name, values in arrays.items()}
    return types.Datum(model_input=prompt(datum.inputs), loss_fn_inputs=inputs)


def loss_config(loss: LossConfig) -> dict[str, float] | None:
    if loss.kind == "importance_sampling":
        return None
    return {"clip_low_threshold": 1 - loss.clip_low, "clip_high_threshold": 1 + loss.clip_high}


def adam(config: Config, rate: float) -> Any:
    from tinker import types

    return types.AdamParams(
        learning_rate=rate,
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
        eps=config.optimizer.eps,
        weight_decay=config.training.weight_decay,
        grad_clip_norm=config.training.max_grad_norm,
    )


def sampling(*, max_tokens: int, temperature: float, seed: int, stop_ids: Sequence[int]) -> Any:
    from tinker import types

    return types.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=list(stop_ids))


def logprobs(output: Any) -> list[np.ndarray]:
    """Of each datum's targets, [S - 1], from a forward pass."""
    return [np.asarray(found["logprobs"].to_numpy(), dtype=np.float64).reshape(-1) for found in output.loss_fn_outputs]


def grad_norm(answer: Any) -> dict[str, float]:
    """The norm of the gradient where the service reports one, else nothing."""
    for name, value in (answer.metrics or {}).items():
        if any(known in name for known in GRAD_NORMS) and math.isfinite(value):
            return {"grad_norm": float(value)}
    return {}
