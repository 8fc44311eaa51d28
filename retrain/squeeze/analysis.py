"""How many ranks an adapter uses: the spectrum of every layer, and what a smaller rank would keep of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrain.squeeze.adapter import Adapter, Layer, factors
from retrain.squeeze.lowrank import decompose, retained
from retrain.types import ConfigError


@dataclass(frozen=True)
class LayerSpectrum:
    """shape: outputs and inputs of one of its `count` maps. singular_values: of dW = s B A, falling, one for each rank;
    of a stack of maps, the root of their summed squares. variance: V(k) at k = 1..rank."""

    name: str
    layout: str
    shape: tuple[int, int]
    count: int
    rank: int
    alpha: float
    scale: float
    singular_values: tuple[float, ...]
    variance: tuple[float, ...]

    def kept(self, rank: int) -> float:
        """V at a rank; 1 from the layer's own on."""
        return self.variance[rank - 1] if rank < self.rank else 1.0

    def rank_for(self, variance: float, ranks: Sequence[int] = ()) -> int:
        """The smallest rank (of `ranks`, where there are some) that keeps this share; else the layer's own."""
        candidates = sorted(ranks) or range(1, self.rank)
        return next((k for k in candidates if k < self.rank and self.kept(k) >= variance), self.rank)

    def parameters(self, rank: int) -> int:
        return self.count * min(rank, self.rank) * sum(self.shape)


@dataclass(frozen=True)
class Analysis:
    """What every candidate rank would keep, over the layers. recommended_rank: the smallest whose mean is at least
    min_variance_retention; None where no candidate's is."""

    adapter: str
    source_rank: int
    min_variance_retention: float
    ranks: tuple[int, ...]
    mean_variance: dict[int, float]
    min_variance: dict[int, float]
    worst_layer: dict[int, str]
    parameters: dict[int, int]
    recommended_rank: int | None
    layers: tuple[LayerSpectrum, ...]


def spectrum_of(layer: Layer, b_EOR: Tensor, a_ERI: Tensor) -> LayerSpectrum:
    values_ER = decompose(b_EOR, a_ERI).values_ER
    outputs, inputs = b_EOR.shape[1], a_ERI.shape[2]
    return LayerSpectrum(
        name=layer.name,
        layout=layer.layout,
        shape=(inputs, outputs) if layer.layout == "embedding" else (outputs, inputs),
        count=layer.count,
        rank=layer.rank,
        alpha=layer.alpha,
        scale=layer.scale,
        singular_values=tuple((torch.linalg.vector_norm(values_ER, dim=0) * abs(layer.scale)).tolist()),
        variance=tuple(retained(values_ER).tolist()),
    )


def spectra(adapter: Adapter, device: torch.device) -> list[LayerSpectrum]:
    """Of every layer, one at a time: in float64 and taken apart, all of them would be many times the adapter's size."""
    return [
        spectrum_of(layer, *(factor.to(device) for factor in factors(layer, adapter.tensors)))
        for layer in adapter.layers
    ]


def summarize(
    adapter: str, layers: Sequence[LayerSpectrum], *, target_ranks: Sequence[int], min_variance_retention: float
) -> Analysis:
    """target_ranks: candidates, none above the source rank; empty for the powers of two up to it, and itself."""
    source = max(layer.rank for layer in layers)
    ranks = tuple(sorted(target_ranks)) or tuple(sorted({2**i for i in range(source.bit_length())} | {source}))
    mean = {k: math.fsum(layer.kept(k) for layer in layers) / len(layers) for k in ranks}
    worst = {k: min(layers, key=_kept_at(k)) for k in ranks}
    return Analysis(
        adapter=adapter,
        source_rank=source,
        min_variance_retention=min_variance_retention,
        ranks=ranks,
        mean_variance=mean,
        min_variance={k: layer.kept(k) for k, layer in worst.items()},
        worst_layer={k: layer.name for k, layer in worst.items()},
        parameters={k: sum(layer.parameters(k) for layer in layers) for k in ranks},
        recommended_rank=next((k for k in ranks if mean[k] >= min_variance_retention), None),
        layers=tuple(layers),
    )


def check_rank(adapter: str, rank: int, source: int) -> None:
    if not 1 <= rank <= source:
        raise ConfigError(f"{adapter}: of rank {source}, cannot be squeezed to {rank}; give a rank from 1 to {source}")


def _kept_at(rank: int) -> Callable[[LayerSpectrum], float]:
    return lambda layer: layer.kept(rank)


def ranks_per_layer(analysis: Analysis, target_ranks: Sequence[int], sites: Mapping[str, str]) -> dict[str, int]:
    """For each layer the smallest rank that keeps min_variance_retention of *its* variance.

    sites: the module of each layer; two layers of one module share a rank, which is the larger of theirs.
    """
    needed = {layer.name: layer.rank_for(analysis.min_variance_retention, target_ranks) for layer in analysis.layers}
    shared: dict[str, int] = {}
    for name, rank in needed.items():
        shared[sites[name]] = max(rank, shared.get(sites[name], 0))
    return {name: shared[sites[name]] for name in needed}
