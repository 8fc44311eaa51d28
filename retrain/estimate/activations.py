"""What the forward pass keeps for the backward pass: counted tensor by tensor, as autograd saves them."""

from __future__ import annotations

from collections.abc import Mapping

from retrain.estimate.shape import ModelShape
from retrain.estimate.work import Rows

FP32 = 4
BESIDE_ATTENTION = ("q_proj", "k_proj", "v_proj")
BESIDE_MLP = ("gate_proj", "up_proj")


def activations(
    shape: ModelShape,
    rows: Rows,
    *,
    item: int,
    checkpointing: bool,
    rank: int,
    targets: Mapping[str, tuple[int, int]],
    dropout: bool,
) -> int:
    """Bytes kept for the backward pass of a micro-batch, with what one block computes on the way.

    item: bytes of a number of the base model. checkpointing: every block's input is kept, and the inside of one
    block at a time, computed again. targets: the linear modules with an adapter of `rank`.
    """
    inside = _block(shape, rows, item, rank, targets, dropout)
    if not checkpointing:
        return rows.tokens * shape.layers * inside
    # Gradients of the block's inside stand beside it; the mask is there once, boolean.
    beside = 2 * shape.intermediate * FP32 + shape.hidden * item
    mask = rows.width if rows.shared else 0
    return rows.tokens * (shape.layers * shape.hidden * item + inside + beside + mask)


def _block(
    shape: ModelShape, rows: Rows, item: int, rank: int, targets: Mapping[str, tuple[int, int]], dropout: bool
) -> int:
    """Bytes that one block saves per token, by torch's saved-tensor hooks on Llama and Qwen3 (2026-11-30).

    Saved: the outputs of gate, up and the activation; keys and values repeated for every query head, queries, and what
    attention returns; the residual stream before each norm, in float32; with qk_norm, queries and keys before it,
    likewise; for each adapter its input, in float32 because adapters are, and rank numbers; a float mask of each row.
    """
    narrow = 3 * shape.intermediate + 4 * shape.queries + (rows.width if rows.shared else 0)
    wide = 2 * shape.hidden + (shape.queries + shape.keys if shape.qk_norm else 0)
    wide += rank * len(targets) + _adapter_inputs(shape, item, targets)
    if dropout:
        wide += 2 * sum(inputs for inputs, _ in targets.values())
    return item * narrow + FP32 * wide


def _adapter_inputs(shape: ModelShape, item: int, targets: Mapping[str, tuple[int, int]]) -> int:
    """Numbers per token. A narrower base's are cast to float32 for every adapter by itself; in float32, adapters that
    read the same tensor share it, and that of o_proj is what attention has saved already."""
    if item < FP32:
        return sum(inputs for inputs, _ in targets.values())
    count = shape.hidden * any(name in targets for name in BESIDE_ATTENTION)
    count += shape.hidden * any(name in targets for name in BESIDE_MLP)
    return count + shape.intermediate * ("down_proj" in targets)
