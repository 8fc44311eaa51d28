"""`engine = "pytorch"`: samples in this process, from the very modules that train.

Each prompt is prefilled once and its KV cache is shared by the group; rows that have ended leave the batch. The random
numbers of a completion come from its own stream, so they do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrain.backend.model import Policy
from retrain.streams import uniforms
from retrain.types import Completion, RetrainError

# Rows that have ended are dropped from the batch when at most this share is still running: copying the cache costs too.
COMPACT_BELOW = 0.8


class PyTorchEngine:
    """See `retrain.inference.Engine`. Publishing is naming: the weights served are the trainer's own."""

    def __init__(self, policy: Policy, *, prefix_caching: bool = True) -> None:
        self.policy = policy
        self.prefix_caching = prefix_caching
        self.policy_version = 0

    def publish(self, version: int) -> None:
        self.policy_version = version

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        self.policy.peft.eval()
        groups, size = streams_PG.shape
        logits_BV, cache, prompt_mask_BS = self._prefill(prompts, size)
        noise_BT = torch.from_numpy(uniforms(streams_PG.reshape(-1), max_tokens)).to(self.policy.device)
        tokens_BT, logprobs_BT, lengths_B = self._decode(logits_BV, cache, prompt_mask_BS, noise_BT, temperature)
        done = [self._completion(t[:n], p[:n]) for t, p, n in zip(tokens_BT, logprobs_BT, lengths_B, strict=True)]
        return [tuple(done[p * size : (p + 1) * size]) for p in range(groups)]

    def _prefill(self, prompts: Sequence[np.ndarray], size: int) -> tuple[Tensor, Any, Tensor]:
        """Logits [P * size, V] after each prompt, its KV cache and its left-padding mask, repeated for the group."""
        if not self.prefix_caching:
            prompts, size = [prompt for prompt in prompts for _ in range(size)], 1
        width = max(map(len, prompts))
        tokens = np.full((len(prompts), width), self.policy.eos_ids[0], dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        mask_PS = torch.from_numpy(mask).to(self.policy.device)
        outputs = self.policy.lm(
            input_ids=torch.from_numpy(tokens).to(self.policy.device),
            attention_mask=mask_PS,
            position_ids=(mask_PS.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = outputs.past_key_values
        if size > 1:
            cache.batch_repeat_interleave(size)
        return (
            outputs.logits[:, -1].repeat_interleave(size, dim=0),
            cache,
            mask_PS.repeat_interleave(size, dim=0),
        )

    def _decode(
        self, logits_BV: Tensor, cache: Any, mask_BS: Tensor, noise_BT: Tensor, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and log-probs [B, T] and lengths [B]; row b is valid up to its length, end of sequence included."""
        rows, limit = noise_BT.shape
        device = noise_BT.device
        tokens_BT = torch.zeros(rows, limit, dtype=torch.long, device=device)
        logprobs_BT = torch.zeros(rows, limit, device=device)
        lengths_B = torch.full((rows,), limit, dtype=torch.long, device=device)
        eos = torch.tensor(self.policy.eos_ids, device=device)
        alive = torch.arange(rows, device=device)  # the original row of each row still in the batch
        running = torch.ones(rows, dtype=torch.bool, device=device)
        positions = mask_BS.sum(1)
        for t in range(limit):
            chosen, logprob = sample(logits_BV, noise_BT[alive, t], temperature)
            # Rows that ended but still ride along write behind their length, where nothing reads.
            tokens_BT[alive, t], logprobs_BT[alive, t] = chosen, logprob
            ended = running & torch.isin(chosen, eos)
            lengths_B[alive[ended]] = t + 1
            running &= ~ended
            left = int(running.sum())
            if left == 0 or t + 1 == limit:
                break
            if left <= COMPACT_BELOW * len(running):
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, chosen, mask_BS, positions, running = (
                    x[keep] for x in (alive, chosen, mask_BS, positions, running)
                )
            mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(mask_BS), 1)), dim=1)
            outputs = self.policy.lm(
                input_ids=chosen[:, None],
                attention_mask=mask_BS,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits_BV, positions = outputs.logits[:, -1], positions + 1
        if not logprobs_BT.isfinite().all():
            raise RetrainError(
                "the model's logits are not finite, so nothing can be sampled: the adapter has diverged, or the number "
                "format is too narrow. Go back to an earlier checkpoint, with a lower training.lr or in fp32"
            )
        return tokens_BT.cpu().numpy(), logprobs_BT.cpu().numpy(), lengths_B.cpu().numpy()

    def _completion(self, tokens_T: np.ndarray, logprobs_T: np.ndarray) -> Completion:
        return Completion(
            tokens_T=tokens_T,
            logprobs_T=logprobs_T,
            finish_reason="stop" if tokens_T[-1] in self.policy.eos_ids else "length",
            policy_version=self.policy_version,
            text=self.policy.tokenizer.decode(tokens_T, skip_special_tokens=True),
        )


def sample(logits_BV: Tensor, noise_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens [B] by inversion of the cumulative distribution at `noise_B` in [0, 1), and their log-probs [B], float32.

    One uniform number a token makes the choice a function of the row's own stream. Temperature 0 takes the most likely.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        logprob, token = logprobs_BV.max(dim=-1)
        return token, logprob
    mass_BV = logprobs_BV.exp().cumsum(-1)
    total = mass_BV[:, -1:]
    # Rounding must not carry the target up to the total: no token's mass lies above it. "right" never picks a token
    # of zero mass, because its cumulative value equals its predecessor's.
    target = torch.minimum(noise_B[:, None] * total, total * (1 - torch.finfo(torch.float32).eps))
    # Logits that are not finite find no token at all; their log-prob tells.
    token = torch.searchsorted(mass_BV, target, right=True).squeeze(1).clamp(max=mass_BV.shape[1] - 1)
    return token, logprobs_BV.gather(1, token[:, None]).squeeze(1)
