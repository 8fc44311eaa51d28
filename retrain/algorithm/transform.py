"""Token-level credit: one advantage a token from one a completion, inside the training forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from retrain.algorithm.choices import check_choice
from retrain.algorithm.plugins import load_tensor_function
from retrain.plugin import is_dotted_path
from retrain_kernels.token_advantages import TRANSFORM_MODES, token_advantages

KEY = "algorithm.transform_mode"

MODES = TRANSFORM_MODES


def token_credit(
    advantages: Tensor,
    uncertainty: Tensor,
    planning: Tensor,
    cu_seqlens: Tensor,
    *,
    transform_mode: str,
    gtpo_beta: float,
    hicra_alpha: float,
    sepa_lambda: float,
) -> Tensor:
    """Spread episode advantages over the tokens of their completions: [N] float32, constants for the gradient.

    advantages: [B] floating, from group_advantages; a micro-batch may hold a part of a group. uncertainty: [N]
    floating; planning: [N] bool; cu_seqlens: [B + 1] integer, completion i owns cu_seqlens[i]:cu_seqlens[i + 1].
    transform_mode: one of MODES, or a dotted path to fn(advantages, uncertainty, planning, cu_seqlens) -> Tensor[N].
    Raises ConfigError for an unknown mode or a plug-in that cannot be loaded, RetrainError for one that fails.
    """
    if is_dotted_path(transform_mode):
        names = ["advantages[B]", "uncertainty[N]", "planning[N]", "cu_seqlens[B+1]"]
        function = load_tensor_function(transform_mode, what=KEY, parameters=names)
        with torch.no_grad():
            return function(advantages, uncertainty.detach(), planning, cu_seqlens, size=len(uncertainty))
    check_choice(KEY, transform_mode, MODES, plugin=True)
    return token_advantages(
        advantages,
        uncertainty,
        planning,
        cu_seqlens,
        # Only group statistics look at the ids, and these advantages already carry them.
        torch.zeros_like(advantages, dtype=torch.int32),
        advantage_mode="precomputed",
        transform_mode=transform_mode,
        gtpo_beta=gtpo_beta,
        hicra_alpha=hicra_alpha,
        sepa_lambda=sepa_lambda,
    )
