"""LoRA-Squeeze (`[squeeze]`): how many ranks a trained adapter uses, and a smaller one that computes nearly the same.

It works on files: no model is loaded. See docs/squeeze.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retrain.config import SqueezeConfig, build
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
    section = _section(
        target_ranks=target_ranks,
        min_variance_retention=min_variance_retention,
        source_rank=source_rank,
        device=device,
    )
    on = open_device(device)
    return _analyze(read_adapter(Path(path)), section, on)


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
    section = _section(
        compress_to=rank,
        per_layer=per_layer,
        target_ranks=target_ranks,
        min_variance_retention=min_variance_retention,
        source_rank=source_rank,
        device=device,
    )
    source, output, on = Path(path), Path(out), open_device(device)
    check_output(output, source)
    adapter = read_adapter(source)
    analysis = _analyze(adapter, section, on)
    ranks = _ranks(adapter, analysis, section)
    done = describe(analysis, ranks, str(output))
    write_adapter(output, squeezed_config(adapter, ranks), squeezed_tensors(adapter, ranks, on), done)
    return done


def _section(*, target_ranks: Sequence[int], **keys: Any) -> SqueezeConfig:
    """The keys as they are checked in a file."""
    section = build({"squeeze": {"target_ranks": list(target_ranks), **keys}}).squeeze
    assert section is not None
    return section


def _analyze(adapter: Adapter, section: SqueezeConfig, device: torch.device) -> Analysis:
    rank = max(layer.rank for layer in adapter.layers)
    if section.source_rank not in (0, rank):
        said = f"{section.source_rank} as squeeze.source_rank (or model.lora_rank) says"
        raise ConfigError(f"{adapter.folder}: has rank {rank}, not {said}")
    for wanted in (*section.target_ranks, section.compress_to or rank):
        check_rank(str(adapter.folder), wanted, rank)
    return summarize(
        str(adapter.folder),
        spectra(adapter, device),
        target_ranks=section.target_ranks,
        min_variance_retention=section.min_variance_retention,
    )


def _ranks(adapter: Adapter, analysis: Analysis, section: SqueezeConfig) -> dict[str, int]:
    """The new rank of each layer."""
    if section.per_layer:
        if any(layer.layout == "experts" for layer in adapter.layers):
            raise ConfigError(f"{adapter.folder}: per_layer: PEFT has no rank_pattern for a layer's stacked parameters")
        return ranks_per_layer(analysis, section.target_ranks, {layer.name: layer.site for layer in adapter.layers})
    rank = section.compress_to or analysis.recommended_rank
    if rank is None:
        raise ConfigError(
            f"{adapter.folder}: none of the ranks {', '.join(map(str, analysis.ranks))} keeps "
            f"{analysis.min_variance_retention:.1%} on average; give compress_to, more target_ranks or a lower "
            "min_variance_retention"
        )
    return {layer.name: min(rank, layer.rank) for layer in adapter.layers}


def open_device(name: str) -> torch.device:
    """Raises ConfigError for a device that is not there or does not compute in float64."""
    try:
        torch.linalg.qr(torch.eye(2, dtype=torch.float64, device=name))[0].sum().item()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f'squeeze.device = "{name}": cannot be used: {reason:.200}. Use "cpu"') from error
    return torch.device(name)
