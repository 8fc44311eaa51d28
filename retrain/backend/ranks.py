"""The rank of the adapter that trains: squeezed in the course of a training, or taken over from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from retrain.backend.model import Policy
from retrain.squeeze.layouts import alpha_for, alpha_of, rank_of, scale_of
from retrain.squeeze.lowrank import Truncated, decompose, retained, truncate
from retrain.types import RetrainError

ADAPTER = "default"
ADAPTER_CONFIG = "adapter_config.json"


@torch.no_grad()
def squeeze(policy: Policy, optimizer: torch.optim.Adam | torch.optim.AdamW, rank: int) -> dict[str, float]:
    """Truncate every layer to `rank`, which is below its own, and go on training from there.

    The function becomes that of the best approximation of each s B A (LoRA-Squeeze, arXiv 2602.10993), at the same
    scale s. The optimizer's moments go with the parameters (`_project`); its count of steps, and with it the bias
    correction and the learning rate's schedule, stay. Returns the share of the variance that each layer kept.
    """
    kept = {}
    config: Any = policy.peft.peft_config[ADAPTER]
    for name, layer in _layers(policy):
        a, b = _factors(layer)
        # Metal has no float64.
        device = torch.device("cpu") if policy.device.type == "mps" else policy.device
        parts = decompose(b[None].to(device), a[None].to(device))
        small = truncate(parts, rank)
        kept[name] = retained(parts.values_ER)[rank - 1].item()
        _project(optimizer, a, b, small)
        _set(layer, small.a_EKI[0], small.b_EOK[0])
        alpha = alpha_for(_scaling(config), rank, layer.scaling[ADAPTER])
        _rescale(layer, config, rank, alpha)
        config.r, config.lora_alpha = rank, alpha
    return kept


def _project(optimizer: torch.optim.Optimizer, a: nn.Parameter, b: nn.Parameter, small: Truncated) -> None:
    """The moments of the gradients that the new factors would have had.

    New A = N A and new B = B M, so a gradient G of dW gives the new factors s B'^T G = M^T (s B^T G) and
    s G A'^T = (s G A^T) N^T: linear in the gradients of the old ones, hence exact for the first moments (of a policy
    that moved little meanwhile). For the second, the products of different ranks' gradients are not known and taken to
    cancel: each is the sum of the old ones, weighted by the squares, which a rotation leaves the same in sum.

    Without moments the next updates would be too large: with a count of steps that begins anew, a full step of the
    learning rate in every entry; with one that goes on, up to (1 - beta1) / sqrt(1 - beta2) of it (docs/squeeze.md).
    """
    by_a, by_b = small.by_a_EKR[0], small.by_b_ERK[0]
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        if name in optimizer.state[a]:
            of_a, of_b = optimizer.state[a][name], optimizer.state[b][name]
            optimizer.state[a][name] = (by_b.mT**power @ of_a.to(by_b)).to(of_a)
            optimizer.state[b][name] = (of_b.to(by_a) @ by_a.mT**power).to(of_b)


@torch.no_grad()
def take_up(policy: Policy, found: dict[str, Any]) -> None:
    """Give every layer the rank and alpha that it has in an adapter with the config `found`; its weights are still to
    be loaded."""
    config: Any = policy.peft.peft_config[ADAPTER]
    for name, layer in _layers(policy):
        rank, alpha = rank_of(found, name), alpha_of(found, name)
        if rank != layer.r[ADAPTER]:
            a, b = _factors(layer)
            _set(layer, a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank))
        _rescale(layer, config, rank, alpha)
    config.r, config.lora_alpha = found["r"], found["lora_alpha"]
    config.rank_pattern, config.alpha_pattern = found.get("rank_pattern") or {}, found.get("alpha_pattern") or {}


def has_patterns(folder: Path) -> bool:
    """Whether the layers of the adapter in `folder` differ in rank or alpha, which no config of a run can say."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    config = read_config(folder)
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RetrainError(f"no adapter in {folder}: there is no {ADAPTER_CONFIG}") from None
    except ValueError as error:
        raise RetrainError(f"{path} is damaged: {error}") from error


def _layers(policy: Policy) -> Iterator[tuple[str, LoraLayer]]:
    """Adapted layers by their names in the model."""
    for name, module in policy.lm.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # pyright: ignore[reportReturnType]


def _set(layer: LoraLayer, new_a: Tensor, new_b: Tensor) -> None:
    """New factors in the same parameters: the optimizer and the learner know these."""
    down: Any = layer.lora_A[ADAPTER]
    up: Any = layer.lora_B[ADAPTER]
    for linear, new in ((down, new_a), (up, new_b)):
        linear.weight.grad = None
        linear.weight.data = new.to(linear.weight).contiguous()
    down.out_features = up.in_features = new_a.shape[0]


def _rescale(layer: LoraLayer, config: Any, rank: int, alpha: float) -> None:
    layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = rank, alpha
    # From alpha, as PEFT does: a run that is resumed gets the same number, to the last bit.
    layer.scaling[ADAPTER] = scale_of(_scaling(config), rank, alpha)


def _scaling(config: Any) -> dict[str, Any]:
    return {"use_rslora": config.use_rslora}
