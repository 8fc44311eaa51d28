"""Adapters of every layout that PEFT writes, on a small model, and the updates in them as plain dense matrices."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn


class Experts(nn.Module):
    """Two stacked parameters, as the mixture-of-experts layers of transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 24, 20) * 0.2)
        self.down = nn.Parameter(torch.randn(3, 20, 24) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bti,eij,ejk->btk", x, self.up, self.down)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.wide = nn.Linear(24, 40)
        self.conv = nn.Conv1d(40, 24, 3, padding=1)
        self.experts = Experts()
        self.attend = nn.MultiheadAttention(24, 2, batch_first=True)
        self.narrow = nn.Linear(24, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.experts(self.conv(self.wide(self.embed(ids)).mT).mT)
        return self.head(self.narrow(self.attend(x, x, x)[0].tanh()))


IDS = torch.arange(30).view(2, 15)


def make_net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """The net with an adapter as training leaves it."""
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["wide", "narrow"]} | config
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(make_net(), LoraConfig(**options), autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def save(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """As a user does: PEFT on a fresh base, with every warning an error."""
    return PeftModel.from_pretrained(make_net(), folder, autocast_adapter_dtype=False).to(dtype).eval()


def updates(model: PeftModel) -> dict[str, Tensor]:
    """dW of every layer by PEFT's own computation, float64 [E, O, I]: E maps stacked in one layer."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and module.r:
            delta = module.double().get_delta_weight("default").detach()
            found[name] = delta if isinstance(module, ParamWrapper) else delta.flatten(1)[None]
    return found


def truncated(delta_EOI: Tensor, rank: int) -> Tensor:
    """By a dense SVD."""
    u, s, vh = torch.linalg.svd(delta_EOI.double(), full_matrices=False)
    return u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
