"""How large a run will be, from its config and the model's config.json alone: no torch, no weights.

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
from retrain.config import Config

# Length of a prompt where the config sets no cap: the true one is known only when the data is read.
PROMPT_TOKENS = 256
# Elements of [N, V] that retrain_kernels.linear_logprob holds at a time: on a CPU in two float32 buffers, in the Triton
# kernels in the model's number format.
CPU_LOGITS_ELEMENTS = 2**19
GPU_LOGITS_ELEMENTS = 2**26
FP32 = 4
# Parameters below which a model takes one CPU thread: see retrain.backend.devices.settle_threads.
SMALL_MODEL = 10_000_000
ITEM_BYTES = {"fp32": 4, "bf16": 2}


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
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """Parameters of the base model; a tied head counts once."""
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
        return self.layers * (linear + norms) + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def lora_parameters(self, rank: int, target_modules: str | tuple[str, ...]) -> int:
        """Parameters of a LoRA adapter: A [rank, inputs] and B [outputs, rank] of every targeted module."""
        targets = self.linears if target_modules == "all-linear" else target_modules
        return self.layers * sum(rank * sum(self.linears[name]) for name in targets if name in self.linears)


@dataclass(frozen=True)
class Size:
    """One large tensor or group of tensors. allocated: False for what a naive trainer would hold and this one never
    does."""

    name: str
    bytes: int
    how: str
    allocated: bool = True


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


def prompt_tokens(config: Config) -> int:
    """Tokens a prompt is taken to have."""
    return config.training.max_prompt_tokens or PROMPT_TOKENS


def tokens_per_step(config: Config) -> dict[str, int]:
    """Completions of a step, and the most tokens that they and their prompts can have; of the largest step where the
    batch size adapts."""
    training, adaptive = config.training, config.backpressure
    prompts = adaptive.max_batch_size if adaptive.enabled else training.batch_size
    completions = prompts * training.group_size
    return {
        "prompts": prompts,
        "completions": completions,
        "prompt_tokens": prompts * prompt_tokens(config),
        "completion_tokens": completions * training.max_tokens,
    }


def base_dtype(config: Config) -> str:
    """Number format of the base model, a key of ITEM_BYTES."""
    dtype = config.training.dtype
    return dtype if dtype != "auto" else ("fp32" if config.backend.devices == "cpu" else "bf16")


def sizes(config: Config, shape: ModelShape) -> list[Size]:
    """The largest tensors of a run in bytes, upper bounds where they depend on lengths."""
    training = config.training
    on_cpu = config.backend.devices == "cpu"
    dtype = base_dtype(config)
    item = ITEM_BYTES[dtype]
    block = 2 * CPU_LOGITS_ELEMENTS * FP32 if on_cpu else GPU_LOGITS_ELEMENTS * item
    adapter = shape.lora_parameters(config.model.lora_rank, config.lora.target_modules)
    step = tokens_per_step(config)
    sampled = step["completions"] * (prompt_tokens(config) + training.max_tokens)
    rows = min(training.micro_batch_tokens, step["completion_tokens"])
    tokens = min(training.micro_batch_tokens, sampled)
    return [
        Size("base weights", shape.parameters * item, f"{shape.parameters:,} parameters, {dtype}, frozen"),
        Size("LoRA weights", adapter * FP32, f"{adapter:,} parameters, fp32"),
        Size("LoRA gradients", adapter * FP32, "fp32"),
        Size("Adam state", 2 * adapter * FP32, "two moments, fp32"),
        Size(
            "KV cache",
            2 * shape.layers * shape.kv_heads * shape.head_dim * sampled * item,
            f"{step['completions']} completions x ({prompt_tokens(config)} prompt + {training.max_tokens} new tokens)",
        ),
        Size(
            "activations",
            _activations(shape, tokens, item, training.gradient_checkpointing),
            f"rough, {tokens:,} tokens a micro-batch, {'re' if training.gradient_checkpointing else 'not re'}computed",
        ),
        Size("logits block", min(block, rows * shape.vocab * FP32), "the part held at a time"),
        Size("logits [N, V]", rows * shape.vocab * FP32, f"{rows:,} x {shape.vocab:,} fp32", allocated=False),
    ]


def _activations(shape: ModelShape, tokens: int, item: int, checkpointing: bool) -> int:
    """Stored for the backward pass: every layer's input, and the inside of one layer, or of all when not recomputed."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inside = 4 * shape.hidden + 2 * (queries + 2 * keys) + 3 * shape.intermediate
    layers_inside = 1 if checkpointing else shape.layers
    return tokens * item * (shape.layers * shape.hidden + layers_inside * inside)
