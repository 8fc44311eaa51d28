"""The weights that sample: those of the base with the adapter merged in, in a copy. The base itself is never written.

Every copy is computed from the pristine base as W + scale * B A in float32 and rounded once: nothing accumulates from
one policy version to the next.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)


def plain(module: Any) -> Any:
    """The layer of the base, without its adapter."""
    return module.get_base_layer() if is_adapted(module) else module


def merged_weight(module: Any) -> Tensor:
    """The weight of a linear layer as it acts, adapter included: float32 where there is one, else the base's own."""
    weight = plain(module).weight
    if is_adapted(module):
        for name in module.active_adapters:
            weight = weight.float() + module.get_delta_weight(name).float()
    return weight


class MergedModules:
    """A copy of a transformers model without LoRA layers; it shares every tensor that the adapter does not change.

    dtype: of the copy's parameters; where it is not the model's own, all of them are copied.
    """

    def __init__(self, lm: Any, dtype: torch.dtype) -> None:
        own = next(lm.parameters()).dtype
        shared = {id(t): t for t in chain(lm.parameters(), lm.buffers())} if dtype == own else {}
        self.lm = copy.deepcopy(lm, shared)
        self.merged: list[tuple[Any, Any]] = []
        for (name, module), (_, source) in zip(list(self.lm.named_modules()), list(lm.named_modules()), strict=True):
            if is_adapted(source):
                layer = copy.copy(plain(module))
                layer._parameters = dict(layer._parameters)
                layer.weight = nn.Parameter(merged_weight(source).to(dtype), requires_grad=False)
                self.lm.set_submodule(name, layer)
                self.merged.append((source, layer))
        if dtype != own:
            # Not `to`, which would round the frequencies of rotary embeddings as well.
            for parameter in self.lm.parameters():
                parameter.data = parameter.data.to(dtype)
        self.lm.eval()

    def refresh(self) -> None:
        for source, layer in self.merged:
            layer.weight.copy_(merged_weight(source))
