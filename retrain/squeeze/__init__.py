"""LoRA-Squeeze (`[squeeze]`): how many ranks a trained adapter uses, and a smaller one that computes nearly the same.

It works on files: no model is loaded. See docs/squeeze.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from retrain.config import SqueezeConfig
from retrain.squeeze.adapter import Adapter, read_adapter
from retrain.squeeze.analysis import Analysis, LayerSpectrum, check_rank, ranks_per_layer, spectra, summarize
from retrain.squeeze.compression import Compression, describe, squeezed_config, squeezed_tensors
from retrain.squeeze.output import as_json, check_output, write_adapter
from retrain.types import ConfigError

__all__ = ["Analysis", "Compression", "LayerSpectrum", "analyze", "as_json", "compress"]

_DEFAULTS = SqueezeConfig()


def analyze(
    path: str | Path,
    *,
    target_ranks: Sequence[int] = _DEFAULTS.target_ranks,
    min_variance_retention: float = _DEFAULTS.min_variance_retention,
    source_rank: int = _DEFAULTS.source_rank,
    device: str = _DEFAULTS.device,
) -> Analysis:
    """What smaller ranks would keep of the adapter in a folder; the arguments are the keys of `[squeeze]`.

    source_rank: the rank that the adapter must have; 0 takes any.
    Raises ConfigError where there is no adapter, one that cannot be squeezed exactly, or a rank that it does not have.
    """
    adapter = read_adapter(Path(path))
    return _analyze(adapter, target_ranks, min_variance_retention, source_rank, open_device(device))


def compress(
    path: str | Path,
    out: str | Path,
    *,
    rank: int = _DEFAULTS.compress_to,
    per_layer: bool = _DEFAULTS.per_layer,
    target_ranks: Sequence[int] = _DEFAULTS.target_ranks,
    min_variance_retention: float = _DEFAULTS.min_variance_retention,
    source_rank: int = _DEFAULTS.source_rank,
    device: str = _DEFAULTS.device,
) -> Compression:
    """Write a smaller adapter to `out`: of `rank`, or (0) of the recommended one.

    per_layer: every layer gets the smallest rank (of target_ranks, where given) that keeps min_variance_retention.
    Layers of no more than the new rank are taken over bit for bit; the others are rounded once, to their own dtype.
    Raises ConfigError as `analyze` does, where `out` exists or cannot be written, and where no rank is recommended.
    """
    source, output, on = Path(path), Path(out), open_device(device)
    check_output(output, source)
    adapter = read_adapter(source)
    analysis = _analyze(adapter, target_ranks, min_variance_retention, source_rank, on)
    ranks = _ranks(adapter, analysis, rank, per_layer, target_ranks)
    done = describe(analysis, ranks, str(output))
    write_adapter(output, squeezed_config(adapter, ranks), squeezed_tensors(adapter, ranks, on), done)
    return done


def _analyze(
    adapter: Adapter, target_ranks: Sequence[int], min_variance_retention: float, source_rank: int, device: torch.device
) -> Analysis:
    rank = max(layer.rank for layer in adapter.layers)
    if source_rank not in (0, rank):
        raise ConfigError(
            f"{adapter.folder}: has rank {rank}, not {source_rank} as squeeze.source_rank (or model.lora_rank) says"
        )
    check_rank(str(adapter.folder), max(target_ranks, default=rank), rank)
    return summarize(
        str(adapter.folder),
        spectra(adapter, device),
        target_ranks=target_ranks,
        min_variance_retention=min_variance_retention,
    )


def _ranks(
    adapter: Adapter, analysis: Analysis, rank: int, per_layer: bool, target_ranks: Sequence[int]
) -> dict[str, int]:
    """The new rank of each layer."""
    if per_layer:
        if rank:
            raise ConfigError(
                f"rank {rank}: with per_layer the ranks follow from min_variance_retention; give one of the two"
            )
        if any(layer.layout == "experts" for layer in adapter.layers):
            raise ConfigError(f"{adapter.folder}: per_layer: PEFT has no rank_pattern for a layer's stacked parameters")
        return ranks_per_layer(analysis, target_ranks, {layer.name: layer.site for layer in adapter.layers})
    rank = rank or analysis.recommended_rank or 0
    if not rank:
        raise ConfigError(
            f"{adapter.folder}: none of the ranks {', '.join(map(str, analysis.ranks))} keeps "
            f"{analysis.min_variance_retention:.1%} on average; give compress_to, more target_ranks or a lower "
            "min_variance_retention"
        )
    check_rank(str(adapter.folder), rank, analysis.source_rank)
    return {layer.name: min(rank, layer.rank) for layer in adapter.layers}


def open_device(name: str) -> torch.device:
    """Raises ConfigError for a device that is not there or does not compute in float64."""
    try:
        torch.linalg.qr(torch.eye(2, dtype=torch.float64, device=name))[0].sum().item()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f'squeeze.device = "{name}": cannot be used: {reason:.200}. Use "cpu"') from error
    return torch.device(name)
