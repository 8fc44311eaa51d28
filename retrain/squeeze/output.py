"""The folder of a squeezed adapter: a PEFT adapter, squeeze.json with the spectrum and what was done, a README."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from retrain.squeeze.adapter import CONFIG, WEIGHTS
from retrain.squeeze.analysis import Analysis
from retrain.squeeze.compression import Compression
from retrain.types import ConfigError

RECORD = "squeeze.json"
README = "README.md"


def check_output(output: Path, source: Path) -> None:
    """Raise ConfigError unless `output` can become the folder of a new adapter."""
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"{output}: lies in the adapter's own folder; give another output folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: exists already and is never written over; give another output folder")


def write_adapter(output: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], done: Compression) -> None:
    """There as a whole or not at all. Raises ConfigError where it cannot be written."""
    temporary = output.with_name(f".{output.name}.unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary / WEIGHTS, safetensors_bytes(dict(tensors), {"format": "pt"}))
        _write(temporary / CONFIG, _json(config))
        _write(temporary / RECORD, _json(as_json(done.analysis, done)))
        _write(temporary / README, _readme(config, done).encode())
        temporary.replace(output)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rewrite_record(output: Path, done: Compression) -> None:
    """Replace squeeze.json: the evaluation comes after the adapter."""
    temporary = output / f".{RECORD}.tmp"
    _write(temporary, _json(as_json(done.analysis, done)))
    temporary.replace(output / RECORD)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def as_json(analysis: Analysis, done: Compression | None) -> dict[str, Any]:
    """Plain values, as in squeeze.json: the analysis, and under "compression" what was done (None: nothing)."""
    compression = None
    if done is not None:
        names = [field.name for field in dataclasses.fields(done) if field.name != "analysis"]
        compression = {name: getattr(done, name) for name in names}
    return {**dataclasses.asdict(analysis), "compression": compression}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _readme(config: Mapping[str, Any], done: Compression) -> str:
    ranks = sorted(set(done.ranks.values()))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"""---
base_model: {json.dumps(config.get("base_model_name_or_path") or "unknown")}
library_name: peft
---

# A squeezed LoRA adapter

The adapter in `{done.analysis.adapter}`, of rank {done.analysis.source_rank}, squeezed to {shown} by `retrain squeeze`
(LoRA-Squeeze, arXiv 2602.10993): in every layer, the best approximation of s B A that the rank allows.

- variance kept: {done.mean_variance:.4%} on average over {len(done.ranks)} layers, {done.min_variance:.4%} in the worst
  (`{done.worst_layer}`)
- parameters: {done.parameters:,} of {done.source_parameters:,}

The scale s of each layer is as it was (`lora_alpha` fell with the rank), so training can go on from here. `{RECORD}`
holds the spectrum of each layer.
"""
