"""The general way to decode: through the model's own modules and transformers' KV cache, whatever the architecture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrain.backend.model import Policy
from retrain.inference.decode import padded
from retrain.inference.merge import MergedModules


def cache_word(lm: Any) -> str:
    """What the model's forward pass calls its cache of keys and values: renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"


class ModuleDecoder:
    """See `retrain.inference.decode.Decoder`. why: what keeps the model from the fast way.

    copied: None decodes from the very modules that train, as they are at each call, the adapter beside the weights.
    """

    def __init__(self, policy: Policy, copied: MergedModules | None, why: str) -> None:
        self.policy, self.copied = policy, copied
        self.lm = copied.lm if copied else policy.lm
        self.path = f"transformers' modules{', merged copy' if copied else ''}: {why}"

    def refresh(self) -> None:
        if self.copied:
            self.copied.refresh()

    def start(self, prompts: Sequence[np.ndarray], size: int, limit: int) -> tuple[Tensor, ModuleRows]:
        self.lm.eval()
        tokens_PS, lengths_P = padded(prompts, self.policy.eos_ids[0], self.policy.device, left=True)
        places_S = torch.arange(tokens_PS.shape[1], device=tokens_PS.device)
        mask_PS = (places_S >= len(places_S) - lengths_P[:, None]).long()
        outputs = self.lm(
            input_ids=tokens_PS,
            attention_mask=mask_PS,
            position_ids=(mask_PS.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        word = cache_word(self.lm)
        cache = outputs[word]
        if size > 1:
            cache.batch_repeat_interleave(size)
        mask_BS, positions_B = mask_PS.repeat_interleave(size, dim=0), lengths_P.repeat_interleave(size)
        rows = ModuleRows(self.lm, word, cache, mask_BS, positions_B)
        return outputs.logits[:, -1].repeat_interleave(size, dim=0), rows


@dataclass
class ModuleRows:
    """See `retrain.inference.decode.Rows`. word: of `cache_word`. mask_BS: 0 for padding, else 1. positions_B: of the
    next token."""

    lm: Any
    word: str
    cache: Any
    mask_BS: Tensor
    positions_B: Tensor

    def step(self, tokens_B: Tensor) -> Tensor:
        self.mask_BS = torch.cat((self.mask_BS, self.mask_BS.new_ones(len(tokens_B), 1)), dim=1)
        outputs = self.lm(
            input_ids=tokens_B[:, None],
            attention_mask=self.mask_BS,
            position_ids=self.positions_B[:, None],
            use_cache=True,
            **{self.word: self.cache},
        )
        self.positions_B = self.positions_B + 1
        return outputs.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask_BS, self.positions_B = self.mask_BS[rows], self.positions_B[rows]
