"""How uncertain the policy was at each token: the quantity that GTPO and SEPA weigh credit by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retrain.algorithm.choices import check_choice
from retrain.types import ConfigError
from retrain_kernels.token_advantages.reference import MAX_UNCERTAINTY

KEY = "algorithm.uncertainty"


def _variance(logprob: Tensor) -> Tensor:
    p = logprob.exp()
    return p * (1 - p)


# What the sampled token's log-probability alone gives; "entropy" takes the full distribution.
_FROM_LOGPROB: dict[str, Callable[[Tensor], Tensor]] = {
    "surprisal": torch.neg,
    "variance": _variance,
}

KINDS = ("auto", "entropy", *_FROM_LOGPROB)


def resolve(kind: str, *, has_entropy: bool) -> str:
    """Settle at the start of a run which uncertainty is used: "auto" is "entropy" where there is one, else "surprisal".

    has_entropy: whether backend and engine give the entropy of the full distribution. Raises ConfigError for an
    unknown kind, and for "entropy" where there is none.
    """
    check_choice(KEY, kind, KINDS)
    if kind == "auto":
        return "entropy" if has_entropy else "surprisal"
    if kind == "entropy" and not has_entropy:
        raise ConfigError(
            f'{KEY} = "entropy": this backend does not give the entropy of the full next-token distribution; '
            'use "surprisal", "variance" or "auto"'
        )
    return kind


@torch.no_grad()
def token_uncertainty(kind: str, logprob: Tensor, entropy: Tensor | None = None) -> Tensor:
    """Uncertainty of each token, clamped to [0, 50]: [N], a constant for the gradient.

    kind: one of KINDS, resolved by whether entropy is given. logprob: [N] log-probability of the sampled tokens at the
    sampling temperature; entropy: [N] in nats. Raises ConfigError as `resolve` does.
    """
    kind = resolve(kind, has_entropy=entropy is not None)
    values = entropy if kind == "entropy" and entropy is not None else _FROM_LOGPROB[kind](logprob)
    return values.clamp(0.0, MAX_UNCERTAINTY)
