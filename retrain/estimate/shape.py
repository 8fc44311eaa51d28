"""The shape of a model, from its config.json alone: no torch, no weights.

The counts are exact for decoder-only models with the layer layout of Llama (gated MLP, grouped-query attention), which
Llama, Mistral, Qwen2 and Qwen3 share; other dense models come out close.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain.assets import resolve_model

# Parameters below which a model takes one CPU thread: see retrain.backend.devices.settle_threads.
SMALL_MODEL = 10_000_000


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder-only transformer. qkv_bias, out_bias, mlp_bias, qk_norm: whether it has them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the linear modules of one layer."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; those of the head are as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the base model; a tied head counts once."""
        return self.layers * self.block + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def block(self) -> int:
        """Parameters of one transformer block."""
        biased = {
            "q_proj": self.qkv_bias,
            "k_proj": self.qkv_bias,
            "v_proj": self.qkv_bias,
            "o_proj": self.out_bias,
            "gate_proj": self.mlp_bias,
            "up_proj": self.mlp_bias,
            "down_proj": self.mlp_bias,
        }
        linear = sum(inputs * outputs + outputs * biased[name] for name, (inputs, outputs) in self.linears.items())
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return linear + norms

    def lora_parameters(self, rank: int, target_modules: str | tuple[str, ...]) -> int:
        """Parameters of a LoRA adapter: A [rank, inputs] and B [outputs, rank] of every targeted module."""
        return self.layers * sum(rank * sum(sizes) for sizes in self.targets(target_modules).values())

    def targets(self, target_modules: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Those of `linears` that get an adapter."""
        every = target_modules == "all-linear"
        return {name: sizes for name, sizes in self.linears.items() if every or name in target_modules}


def find_model_config(model: str) -> dict[str, Any] | None:
    """The config.json of a built-in model, a local folder or a downloaded hub model; None where there is none yet."""
    folder = Path(resolve_model(model)).expanduser()
    path = folder / "config.json"
    if not path.is_file() and not folder.is_dir():
        path = _downloaded(model)
    if path is None or not path.is_file():
        return None
    try:
        model_config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return model_config if isinstance(model_config, dict) else None


def _downloaded(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # no hub id, so nothing was downloaded under it
        return None
    return Path(found) if isinstance(found, str) else None


def shape_of(model_config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a config.json describes; None for what this module cannot count (experts, other layouts)."""
    text = model_config.get("text_config", model_config)
    kind = text.get("model_type", "")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if any(not isinstance(text.get(name), int) for name in needed) or any("experts" in name for name in text):
        return None
    heads = text["num_attention_heads"]
    bias = bool(text.get("attention_bias", False))
    return ModelShape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied=bool(model_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        qk_norm=kind.startswith("qwen3"),
    )
