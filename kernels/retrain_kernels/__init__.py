"""The numeric operations of RL post-training, one folder each: log-probabilities, token-level credit, policy loss.

Depends on torch alone. Every operation has a plain PyTorch `reference.py`, which is the truth the fast
implementations are tested against, and a README with its derivation, layouts, dtypes and numerics.
"""

from __future__ import annotations

from retrain_kernels.linear_logprob import linear_logprob
from retrain_kernels.policy_loss import policy_loss
from retrain_kernels.token_advantages import token_advantages

__all__ = ["linear_logprob", "policy_loss", "token_advantages"]
