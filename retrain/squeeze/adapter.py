"""A PEFT LoRA adapter in a folder: its layers as products B A, whatever the layout they are stored in, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retrain.squeeze.layouts import alpha_of, check_config, rank_of, scale_of
from retrain.types import ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")
# Tensors of layers that compute more than s B A x, unlike a bias or what a custom backward pass needs.
_FOREIGN = re.compile(r"\.lora_(?!B\.bias$|velora_embed)")

Layout = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True)
class Layer:
    """One adapted layer. a, b: keys of its factors. site: its module's name, by which the config knows it.

    count: maps that are stacked in it, each of rank `rank`. scale: s of dW = s B A.
    """

    name: str
    site: str
    layout: Layout
    a: str
    b: str
    rank: int
    alpha: float
    scale: float
    count: int


@dataclass(frozen=True)
class Adapter:
    """tensors: everything in the weights file, in its own dtypes; what belongs to no layer is carried along."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: tuple[Layer, ...]


def read_adapter(folder: Path) -> Adapter:
    """Raises ConfigError where there is no adapter, or one that cannot be squeezed exactly."""
    config = _read_config(folder)
    check_config(config, str(folder))
    tensors = _read_weights(folder)
    pairs: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _FACTOR.fullmatch(key)
        if match:
            pairs.setdefault(f"{match['module']} {match['embedding'] or ''}".strip(), {})[match["factor"]] = key
        elif foreign := _FOREIGN.search(key):
            raise ConfigError(f"{folder}: cannot be squeezed exactly: it has a tensor {key[foreign.start() + 1 :]}")
    if not pairs:
        raise ConfigError(f"{folder}: there is no LoRA layer in its weights")
    layers = tuple(_layer(folder, config, tensors, keys) for keys in pairs.values())
    return Adapter(folder, config, tensors, layers)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such adapter folder")
        final = folder / "final"
        hint = f"; did you mean {final}?" if (final / CONFIG).is_file() else ""
        raise ConfigError(f"{folder}: no adapter in that folder (there is no {CONFIG}){hint}")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: is not a JSON object")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path, pickled = folder / WEIGHTS, folder / PICKLED_WEIGHTS
    try:
        if path.is_file():
            return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{folder}: its weights are damaged: {' '.join(str(error).split()):.200}") from error
    if pickled.is_file():
        raise ConfigError(
            f"{pickled}: a pickle, which can run code when it is read, and is never opened. Convert it elsewhere: "
            "load the adapter with PEFT and save it again"
        )
    raise ConfigError(f"{folder}: an adapter without weights (there is no {WEIGHTS})")


def _layer(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> Layer:
    if len(keys) < 2:
        raise ConfigError(f"{folder}: is damaged: {next(iter(keys.values()))} is there without its other factor")
    a, b = tensors[keys["A"]], tensors[keys["B"]]
    match = _FACTOR.fullmatch(keys["A"])
    assert match is not None
    name = match["module"].removeprefix(PREFIX)
    # Within a module that PEFT has wrapped: the config knows the module.
    site = name.partition(".base_layer")[0]
    rank, alpha = rank_of(config, site), alpha_of(config, site)
    count, rest = divmod(a.shape[0], rank)
    stacked = bool(config.get("target_parameters"))
    if rest or (count > 1 and not stacked):
        raise ConfigError(f"{folder}: {CONFIG} gives {name} rank {rank}, but its weights have {a.shape[0]}")
    if b.shape[1] != a.shape[0]:
        grouped = "a grouped convolution, whose factors are blocks" if b.ndim > 2 else "damaged: its factors do not fit"
        raise ConfigError(f"{folder}: {name} is {grouped} (A {tuple(a.shape)}, B {tuple(b.shape)})")
    for key, tensor in ((keys["A"], a), (keys["B"], b)):
        if not tensor.isfinite().all():
            raise ConfigError(f"{folder}: {key} is not finite: the training that wrote it had diverged")
    layout: Layout = "embedding" if match["embedding"] else "conv" if a.ndim > 2 else "linear"
    return Layer(
        name=name,
        site=site,
        layout="experts" if count > 1 else layout,
        a=keys["A"],
        b=keys["B"],
        rank=rank,
        alpha=alpha,
        scale=scale_of(config, rank, alpha),
        count=count,
    )


def factors(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(b_EOR, a_ERI) of a layer; E is its count. An embedding's are those of the transposed map."""
    a, b = tensors[layer.a].flatten(1), tensors[layer.b].flatten(1)
    if layer.layout == "embedding":
        # Its B is what is drawn at random and its A what begins at zero: the other way round than elsewhere.
        a, b = b.mT, a.mT
    # PEFT lays the experts of a stack out rank by rank in B, one after the other in A.
    return b.unflatten(1, (layer.rank, layer.count)).permute(2, 0, 1), a.unflatten(0, (layer.count, layer.rank))


def tensors_of(layer: Layer, b_EOK: Tensor, a_EKI: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `factors`: what the file holds of the layer, in the dtypes and kernel shapes of `like`."""
    b, a = b_EOK.permute(1, 2, 0).flatten(1), a_EKI.flatten(0, 1)
    if layer.layout == "embedding":
        a, b = b.mT, a.mT
    old_a, old_b = like[layer.a], like[layer.b]
    a, b = a.reshape(a.shape[0], *old_a.shape[1:]), b.reshape(b.shape[0], b.shape[1], *old_b.shape[2:])
    return {layer.a: _stored(a, old_a), layer.b: _stored(b, old_b)}


def _stored(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype).contiguous()
