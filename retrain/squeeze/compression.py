"""A smaller adapter with the same function, as far as its rank allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrain.squeeze.adapter import Adapter, factors, tensors_of
from retrain.squeeze.analysis import Analysis
from retrain.squeeze.layouts import with_ranks
from retrain.squeeze.lowrank import decompose, truncate


@dataclass(frozen=True)
class Compression:
    """What was done. ranks: of each layer. mean_variance, min_variance: kept, over the layers. evaluation: rewards on
    held-out examples beside those of the source, where they were measured."""

    analysis: Analysis
    output: str
    ranks: dict[str, int]
    mean_variance: float
    min_variance: float
    worst_layer: str
    parameters: int
    source_parameters: int
    evaluation: dict[str, Any] | None = None


def describe(analysis: Analysis, ranks: Mapping[str, int], output: str) -> Compression:
    kept = {layer.name: layer.kept(ranks[layer.name]) for layer in analysis.layers}
    worst = min(kept, key=lambda name: kept[name])
    return Compression(
        analysis=analysis,
        output=output,
        ranks=dict(ranks),
        mean_variance=math.fsum(kept.values()) / len(kept),
        min_variance=kept[worst],
        worst_layer=worst,
        parameters=sum(layer.parameters(ranks[layer.name]) for layer in analysis.layers),
        source_parameters=sum(layer.parameters(layer.rank) for layer in analysis.layers),
    )


def squeezed_tensors(adapter: Adapter, ranks: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """The weights of the smaller adapter. A layer that keeps its rank, and what is no factor, stays bit for bit."""
    tensors = dict(adapter.tensors)
    for layer in adapter.layers:
        if ranks[layer.name] < layer.rank:
            b_EOR, a_ERI = (factor.to(device) for factor in factors(layer, adapter.tensors))
            small = truncate(decompose(b_EOR, a_ERI), ranks[layer.name])
            tensors |= tensors_of(layer, small.b_EOK, small.a_EKI, adapter.tensors)
    return tensors


def squeezed_config(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Every layer keeps its scale s: alpha falls with the rank, so that training goes on at the pace it had, and a
    server that knows one scale only has the right one."""
    return with_ranks(adapter.config, {layer.site: (ranks[layer.name], layer.scale) for layer in adapter.layers})
