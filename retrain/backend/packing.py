"""Rollouts to micro-batches: each prompt computed once for the completions that share its row.

A *row* is a prompt followed by completions of its group; each completion attends to the prompt and to itself, and its
positions go on from the prompt's, so a row computes what separate sequences would. Rows of similar width go together
into micro-batches of at most `budget` tokens, padding included. Neither choice changes the loss: tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrain.types import Batch, Rollout

# A row's attention is quadratic in its width, the prompt it saves is linear: beyond this width sharing costs more.
ROW_TOKENS = 512


@dataclass(frozen=True)
class MicroBatch:
    """R rows of width S that hold B completions with N tokens, packed one after another.

    tokens_RS, positions_RS: int64. mask: bool [R, 1, S, S], or None where every row is one plain causal sequence.
    predictor_N: int64, position in the flattened [R * S] hidden states that predicts token n. targets_N: int64.
    sampler_logprob_N: float32. planning_N: bool. advantages_B: float32. cu_seqlens: int32 [B + 1].
    members: positions of the B completions in the list that was packed.
    """

    tokens_RS: Tensor
    positions_RS: Tensor
    mask: Tensor | None
    predictor_N: Tensor
    targets_N: Tensor
    sampler_logprob_N: Tensor
    planning_N: Tensor
    advantages_B: Tensor
    cu_seqlens: Tensor
    members: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    group: int
    members: tuple[int, ...]
    width: int


def pack(
    batch: Batch, members: Sequence[int], *, budget: int, share_prompts: bool, pad_id: int, device: torch.device
) -> list[MicroBatch]:
    """Micro-batches over `batch.rollouts[i] for i in members`, each at most `budget` tokens unless one row is more."""
    rows = sorted(_rows(batch, members, share_prompts), key=lambda row: (row.width, row.members))
    chunks: list[list[_Row]] = []
    for row in rows:
        # Sorted by width, so the newcomer is the widest: it sets what every row of the chunk is padded to.
        if chunks and (len(chunks[-1]) + 1) * row.width <= budget:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return [_build(batch, chunk, pad_id, device) for chunk in chunks]


def _rows(batch: Batch, members: Sequence[int], share_prompts: bool) -> list[_Row]:
    rows: list[_Row] = []
    open_rows: dict[int, int] = {}
    for i in members:
        rollout = batch.rollouts[i]
        at = open_rows.get(rollout.group)
        if share_prompts and at is not None and rows[at].width + len(rollout.tokens_T) <= ROW_TOKENS:
            row = rows[at]
            rows[at] = _Row(row.group, (*row.members, i), row.width + len(rollout.tokens_T))
        else:
            open_rows[rollout.group] = len(rows)
            rows.append(_Row(rollout.group, (i,), len(batch.prompts[rollout.group]) + len(rollout.tokens_T)))
    return rows


def _build(batch: Batch, rows: list[_Row], pad_id: int, device: torch.device) -> MicroBatch:
    count, width = len(rows), max(row.width for row in rows)
    tokens = np.full((count, width), pad_id, dtype=np.int64)
    positions = np.zeros((count, width), dtype=np.int64)
    segments = np.full((count, width), -1, dtype=np.int64)
    predictors: list[np.ndarray] = []
    rollouts: list[Rollout] = []
    for r, row in enumerate(rows):
        prompt = batch.prompts[row.group]
        end = len(prompt)
        tokens[r, :end], positions[r, :end], segments[r, :end] = prompt, np.arange(end), 0
        for segment, i in enumerate(row.members, start=1):
            rollout = batch.rollouts[i]
            start, end = end, end + len(rollout.tokens_T)
            tokens[r, start:end], segments[r, start:end] = rollout.tokens_T, segment
            positions[r, start:end] = len(prompt) + np.arange(end - start)
            # The first token is predicted by the prompt's last position, every other one by its predecessor.
            predictors.append(r * width + np.concatenate(([len(prompt) - 1], np.arange(start, end - 1))))
            rollouts.append(rollout)
    shared = any(len(row.members) > 1 for row in rows)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    lengths = [len(rollout.tokens_T) for rollout in rollouts]
    return MicroBatch(
        tokens_RS=tensor(tokens),
        positions_RS=tensor(positions),
        mask=_attention(tensor(segments)) if shared else None,
        predictor_N=tensor(np.concatenate(predictors)),
        targets_N=tensor(np.concatenate([r.tokens_T for r in rollouts]).astype(np.int64)),
        sampler_logprob_N=tensor(np.concatenate([r.logprobs_T for r in rollouts]).astype(np.float32)),
        planning_N=tensor(np.concatenate([r.planning_T for r in rollouts]).astype(bool)),
        advantages_B=tensor(np.array([r.advantage for r in rollouts], dtype=np.float32)),
        cu_seqlens=tensor(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)),
        members=tuple(i for row in rows for i in row.members),
    )


def _attention(segments_RS: Tensor) -> Tensor:
    """Boolean [R, 1, S, S]: a token sees the prompt (segment 0) and its own segment, up to itself."""
    query, key = segments_RS[:, None, :, None], segments_RS[:, None, None, :]
    width = segments_RS.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments_RS.device).tril()
    # Padding (-1) sees other padding only: its rows stay finite and nothing reads them.
    return ((key == 0) | (key == query)) & causal
