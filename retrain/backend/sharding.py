"""`[backend] sharding = "fsdp"`: the frozen base in parts, one on each rank, put together block by block as it is used.

FSDP2 (`torch.distributed.fsdp.fully_shard`). The adapter, embeddings, norms outside the blocks and the head stay whole
on every rank, so that optimizer, gradients and checkpoints are as without sharding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from retrain.distributed import World
from retrain.types import ConfigError


def shard(lm: Any, device: torch.device, world: World, name: str) -> None:
    """Leave to each rank its part of every block's frozen weights, on `device`. Called by all ranks together.

    lm: a transformers model with LoRA layers inside. name: for the message of the ConfigError for one without blocks.
    """
    blocks = blocks_of(lm)
    if not blocks:
        raise ConfigError(
            f'backend.sharding = "fsdp": model.model = "{name}" does not say which layers repeat; use "none"'
        )
    mesh = init_device_mesh(device.type, (world.size,))
    whole = {parameter for parameter in lm.parameters() if parameter.requires_grad}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole & set(block.parameters()))
    # The root holds nothing of its own: it lets a block be fetched while the one before it is computed.
    fully_shard(lm.base_model, mesh=mesh, ignored_params=_unsharded(lm.base_model))


def blocks_of(lm: Any) -> list[nn.Module]:
    """The layers that repeat, as transformers names them."""
    names = set(getattr(lm, "_no_split_modules", None) or ())
    return [module for module in lm.modules() if type(module).__name__ in names]


def _unsharded(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)}


def whole(parameter: Tensor) -> Tensor:
    """The parameter itself, or what all ranks' parts of it are together. Called by all ranks together."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
