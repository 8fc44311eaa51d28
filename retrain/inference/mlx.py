"""The adapter format of mlx-lm."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def to_mlx(folder: Path) -> None:
    """Write the PEFT adapter in `folder` a second time, beside itself, as mlx-lm reads it.

    PEFT: y += s B (A x) with A [r, in], B [out, r]; mlx: y += s (x a) b with a [in, r], b [r, out]. Both call their
    settings adapter_config.json: PEFT's is replaced.
    """
    config = json.loads((folder / "adapter_config.json").read_bytes())
    rank = config["r"]
    weights = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, side = name.rpartition(".")
        weights[f"{module}.{side.lower()}"] = np.ascontiguousarray(value.T)
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 0,  # the keys name every module in full
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({key.rpartition(".")[0] for key in weights}),
        },
    }
    save_file(weights, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
