"""Optimizer and random generators of a checkpoint, as one safetensors file: tensors, and numbers as JSON in its header.

Reading it runs nothing: no pickle, which would execute whatever a checkpoint from elsewhere holds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from retrain.backend import rng
from retrain.types import RetrainError

TRAINER_STATE = "trainer.safetensors"
_HEADER = "retrain"


def write(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """The state of `optimizer` and of the process's generators. Raises OSError, with the reason, on a full disk."""
    state = optimizer.state_dict()
    numbers, tensors = rng.capture()
    for parameter, values in state["state"].items():
        tensors |= {f"optimizer/{parameter}/{name}": value.cpu().contiguous() for name, value in values.items()}
    # One entry: several would stand in another order in every process.
    header = {_HEADER: json.dumps({"groups": state["param_groups"], "rng": numbers}, allow_nan=False)}
    path.write_bytes(safetensors_bytes(tensors, metadata=header))


def read(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Set `optimizer` and the process's generators. Raises RetrainError for a missing, damaged or foreign file."""
    if not path.is_file():
        raise RetrainError(f"{path.parent} holds no {path.name}: it was not written by this version of retrain")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads(file.metadata()[_HEADER])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RetrainError(f"{path} is damaged: {error}") from error
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        kind, *place = name.split("/")
        if kind == "optimizer":
            state[int(place[0])][place[1]] = value
    optimizer.load_state_dict({"state": dict(state), "param_groups": header["groups"]})
    rng.restore(header["rng"], tensors)
