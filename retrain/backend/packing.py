"""Rollouts to micro-batches: each prompt computed once for the completions that share its row.

A *row* is a prompt followed by completions of its group; each completion attends to the prompt and to itself, and its
positions go on from the prompt's, so a row computes what separate sequences would. Rows of similar width go together
into micro-batches of at most `budget` tokens, padding included. Neither choice changes the loss: tests hold it to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrain.types import Batch, Rollout

if TYPE_CHECKING:
    from retrain.backend.model import Policy

# What a token costs apart from attention, in tokens attended to: it decides how many completions share a row. Measured
# on a CPU at hidden size 128, where the optimum is flat; it grows with the model's width.
TOKEN_COST = 2500
# What one more micro-batch costs, in tokens: rows of different width stay apart where padding them would cost more.
# Measured on a CPU; a GPU needs more tokens to be busy.
MICRO_BATCH_COST = {"cpu": 128, "mps": 2048, "cuda": 2048}


@dataclass(frozen=True)
class MicroBatch:
    """R rows of width S that hold B completions; N counts the tokens of these that are trained on, one after another.

    An environment's tokens are in the rows, where the others see them, and nowhere else.

    tokens_RS, positions_RS: int64. mask: bool [R, 1, S, S], or None where every row is one plain causal sequence.
    predictor_N: int64, position in the flattened [R * S] hidden states that predicts token n. targets_N: int64.
    sampler_logprob_N: float32. planning_N: bool. advantages_B: float32. cu_seqlens: int32 [B + 1].
    members: positions of the B completions in `Batch.rollouts`.
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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of the B completions."""
        return tuple((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist())

    def by_member(self, values_N: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(member, its values [T]) of each completion."""
        return zip(self.members, values_N.split(self.lengths), strict=True)


@dataclass(frozen=True)
class _Row:
    group: int
    members: tuple[int, ...]
    width: int


def pack(
    batch: Batch, members: Sequence[int], *, budget: int, share_prompts: bool, pad_id: int, device: torch.device
) -> list[MicroBatch]:
    """Micro-batches over `batch.rollouts[i] for i in members`: at most `budget` tokens, unless one rollout is more."""
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(batch.rollouts[i].group, []).append(i)
    rows = [row for group in groups for row in _rows(batch, group, groups[group], budget, share_prompts)]
    chunks: list[list[_Row]] = []
    padding = 0
    for row in sorted(rows, key=lambda row: (row.width, row.members)):
        # Sorted by width, so the newcomer is the widest: every row of the chunk is padded to it.
        if chunks:
            padding += len(chunks[-1]) * (row.width - chunks[-1][-1].width)
        if chunks and padding <= MICRO_BATCH_COST[device.type] and (len(chunks[-1]) + 1) * row.width <= budget:
            chunks[-1].append(row)
        else:
            chunks.append([row])
            padding = 0
    return [_build(batch, chunk, pad_id, device) for chunk in chunks]


def loss_denominator(rollouts: Sequence[Rollout], *, aggregation: str, max_tokens: int) -> float:
    """What the loss of a whole optimizer update is divided by, whatever micro-batches it is computed in."""
    if aggregation == "token_mean":
        return sum(map(len, rollouts))
    return len(rollouts) * (max_tokens if aggregation == "constant" else 1)


def _rows(batch: Batch, group: int, members: Sequence[int], budget: int, share_prompts: bool) -> list[_Row]:
    """The completions `members` of one group, in their order, over rows of about the same width."""
    prompt = len(batch.prompts[group])
    lengths = [len(batch.rollouts[i].tokens_T) for i in members]
    share = sum(lengths) / _row_count(prompt, sum(lengths)) if share_prompts else 0.0
    rows: list[_Row] = []
    before = 0
    for i, length in zip(members, lengths, strict=True):
        # A completion goes where its middle falls.
        if rows and before + length / 2 <= share * len(rows) and rows[-1].width + length <= budget:
            rows[-1] = _Row(group, (*rows[-1].members, i), rows[-1].width + length)
        else:
            rows.append(_Row(group, (i,), prompt + length))
        before += length
    return rows


def _row_count(prompt: int, completions: int) -> int:
    """Rows that cost least for a prompt of `prompt` tokens and `completions` tokens of completions in all.

    k rows cost k (P + C / k)^2 in attention and TOKEN_COST (k P + C) in all else, which is least at
    k = C / sqrt(P (P + TOKEN_COST)).
    """
    return max(1, round(completions / math.sqrt(prompt * (prompt + TOKEN_COST))))


def _build(batch: Batch, rows: list[_Row], pad_id: int, device: torch.device) -> MicroBatch:
    count, width = len(rows), max(row.width for row in rows)
    tokens = np.full((count, width), pad_id, dtype=np.int64)
    positions = np.zeros((count, width), dtype=np.int64)
    segments = np.full((count, width), -1, dtype=np.int64)
    predictors: list[np.ndarray] = []
    rollouts = [batch.rollouts[i] for row in rows for i in row.members]
    for r, row in enumerate(rows):
        prompt = batch.prompts[row.group]
        end = len(prompt)
        tokens[r, :end], positions[r, :end], segments[r, :end] = prompt, np.arange(end), 0
        for segment, i in enumerate(row.members, start=1):
            rollout = batch.rollouts[i]
            start, end = end, end + len(rollout.tokens_T)
            tokens[r, start:end], segments[r, start:end] = rollout.tokens_T, segment
            positions[r, start:end] = len(prompt) + np.arange(end - start)
            # Each token is predicted by its predecessor; that of the first is the prompt's last.
            predictor = np.arange(start - 1, end - 1)
            predictor[0] = len(prompt) - 1
            predictors.append(trained(rollout, r * width + predictor))
    shared = any(len(row.members) > 1 for row in rows)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def joined(name: str, dtype: type) -> Tensor:
        return tensor(np.concatenate([trained(r, getattr(r, name)) for r in rollouts]).astype(dtype))

    return MicroBatch(
        tokens_RS=tensor(tokens),
        positions_RS=tensor(positions),
        mask=_attention(tensor(segments)) if shared else None,
        predictor_N=tensor(np.concatenate(predictors)),
        targets_N=joined("tokens_T", np.int64),
        sampler_logprob_N=joined("logprobs_T", np.float32),
        planning_N=joined("planning_T", bool),
        advantages_B=tensor(np.array([r.advantage for r in rollouts], dtype=np.float32)),
        cu_seqlens=tensor(np.concatenate(([0], np.cumsum([len(r) for r in rollouts]))).astype(np.int32)),
        members=tuple(i for row in rows for i in row.members),
    )


def trained(rollout: Rollout, values_T: np.ndarray) -> np.ndarray:
    """What belongs to the tokens that are trained on."""
    return values_T if rollout.sampled_T is None else values_T[rollout.sampled_T]


def _attention(segments_RS: Tensor) -> Tensor:
    """Boolean [R, 1, S, S]: a token sees the prompt (segment 0) and its own segment, up to itself."""
    query, key = segments_RS[:, None, :, None], segments_RS[:, None, None, :]
    width = segments_RS.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments_RS.device).tril()
    # Padding (-1) sees itself at least, so that it stays finite; nothing reads it.
    return ((key == 0) | (key == query)) & causal


@torch.no_grad()
def can_share_prompts(policy: Policy) -> bool:
    """Whether this model computes a shared row as it computes separate sequences; decided by trying it once.

    Windowed and recurrent layers are left out beforehand: on a short probe they look the same.
    """
    config = policy.lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if any(kind != "full_attention" for kind in kinds) or getattr(config, "sliding_window", None):
        return False
    ids = np.arange(12) % config.vocab_size
    probe = Batch(
        prompts=(ids[:4],),
        rollouts=tuple(Rollout(0, part, np.zeros(4), 0.0, np.zeros(4, dtype=bool)) for part in (ids[4:8], ids[8:])),
    )

    def hidden(share: bool) -> Tensor:
        micros = pack(probe, (0, 1), budget=64, share_prompts=share, pad_id=0, device=policy.device)
        assert len(micros) == 1
        positions = micros[0].positions_RS if share else None
        states = policy.hidden(micros[0].tokens_RS, positions, micros[0].mask).flatten(0, 1)
        return states.index_select(0, micros[0].predictor_N).float()

    with policy.together.lockstep():
        shared, separate = hidden(True), hidden(False)
    tolerance = 1e-3 if policy.head.weight.dtype == torch.float32 else 5e-2
    return bool((shared - separate).norm() <= tolerance * separate.norm())
