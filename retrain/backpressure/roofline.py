"""Whether sampling is bound by arithmetic or by memory: the roofline model (Williams, Waterman, Patterson, CACM 2009).

Decoding reads every weight once for the next token of all sequences together, and each sequence's own keys and values.
So its FLOPs per byte grow with the concurrency, until the keys and values dominate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from retrain.estimate import ITEM_BYTES, ModelShape, base_dtype, find_model_config, prompt_tokens, shape_of

if TYPE_CHECKING:
    from retrain.config import Config

Bound = Literal["compute_bound", "memory_bound"]
Roofline = Callable[[int], Bound]
"""Concurrency to what bounds decoding at it."""


def intensity(shape: ModelShape, concurrency: float, *, context: float, item: int) -> float:
    """FLOPs per byte of decoding one token. context: tokens attended to. item: bytes of a number in memory."""
    weights = shape.layers * sum(a * b for a, b in shape.linears.values()) + shape.vocab * shape.hidden
    attended = shape.layers * shape.head_dim * context
    # A product of a weight takes two operations; attention multiplies queries with keys, and weights with values.
    flops = 2 * weights + 4 * shape.heads * attended
    read = item * (weights / concurrency + 2 * shape.kv_heads * attended)
    return flops / read


def open_roofline(config: Config) -> Roofline | None:
    """The hints of a run; None without both peaks, and for a model whose config.json is not here or cannot be counted.

    A completion is taken to attend, on average, to its prompt and half of `max_tokens`.
    """
    section = config.backpressure
    if not section.peak_gflops or not section.peak_bw_gb_s:
        return None
    model_config = find_model_config(config.model.model)
    shape = shape_of(model_config) if model_config is not None else None
    if shape is None:
        return None
    ridge = section.peak_gflops / section.peak_bw_gb_s
    context, item = prompt_tokens(config) + config.training.max_tokens / 2, ITEM_BYTES[base_dtype(config)]

    def label(concurrency: int) -> Bound:
        above = intensity(shape, concurrency, context=context, item=item) >= ridge
        return "compute_bound" if above else "memory_bound"

    return label
