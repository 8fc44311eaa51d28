"""The adapter of one moment as bytes: a safetensors file that holds its ranks and scales in the header.

It is what a sampler in another process takes up, and what a checkpoint keeps of a policy that is not the newest.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from retrain.backend import ranks
from retrain.backend.model import Policy

_HEADER = "adapter"
_SHAPE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """The adapter's tensors by the names that PEFT saves them under; they are the policy's own, not copies."""
    # "auto" would look the base's vocabulary up on the hub, to save embeddings that never change.
    return get_peft_model_state_dict(policy.peft, save_embedding_layers=False)


def adapter_bytes(policy: Policy, metadata: dict[str, str]) -> bytes:
    """The adapter as a safetensors file."""
    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(policy).items()}
    return safetensors_bytes(state, metadata=metadata)


def take(policy: Policy) -> bytes:
    config: Any = policy.peft.peft_config[ranks.ADAPTER]
    return adapter_bytes(policy, {_HEADER: json.dumps({key: getattr(config, key) for key in _SHAPE})})


@torch.no_grad()
def put(policy: Policy, snapshot: bytes) -> None:
    """Give the policy the adapter that `take` took of one on the same base, its ranks included."""
    length = int.from_bytes(snapshot[:8], "little")
    header = json.loads(snapshot[8 : 8 + length])
    ranks.take_up(policy, json.loads(header["__metadata__"][_HEADER]))
    set_peft_model_state_dict(policy.peft, load(snapshot))
