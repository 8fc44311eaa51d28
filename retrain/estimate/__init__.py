"""How large a run will be, from its config and the model's config.json alone: no torch, no weights."""

from __future__ import annotations

from retrain.estimate.memory import Part, Phase, Process, largest_logits, peak_bytes, processes
from retrain.estimate.shape import SMALL_MODEL, ModelShape, find_model_config, shape_of
from retrain.estimate.work import ITEM_BYTES, base_dtype, prompt_tokens, tokens_per_step

__all__ = [
    "ITEM_BYTES",
    "SMALL_MODEL",
    "ModelShape",
    "Part",
    "Phase",
    "Process",
    "base_dtype",
    "find_model_config",
    "largest_logits",
    "peak_bytes",
    "processes",
    "prompt_tokens",
    "shape_of",
    "tokens_per_step",
]
