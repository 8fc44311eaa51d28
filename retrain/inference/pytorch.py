"""`engine = "pytorch"`: samples in this process.

Each prompt is computed once for its group and rows that have ended leave the batch. The random numbers of a completion
come from its own stream, so they do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retrain.backend.model import Policy
from retrain.distributed import ALONE, World
from retrain.inference import Engine
from retrain.inference.decode import Decoder, Rows
from retrain.inference.fused import FusedDecoder, obstacle
from retrain.inference.merge import MergedModules
from retrain.inference.modules import ModuleDecoder
from retrain.streams import uniforms
from retrain.types import Completion, ConfigError, RetrainError

if TYPE_CHECKING:
    from retrain.config import InferenceConfig

# `[inference] dtype` and `kv_cache_dtype`; "auto" is the format of the model, or of the sampling copy.
WEIGHTS = {"bf16": torch.bfloat16}
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# Rows that have ended are dropped from the batch when at most this share is still running: copying the cache costs too.
COMPACT_BELOW = 0.8
# Above this many tokens, a draw adds up probabilities in blocks.
SMALL_VOCABULARY, BLOCK = 4096, 128


class PyTorchEngine(Engine):
    """See `retrain.inference.Engine`.

    merged_copy: decode from a copy of the weights with the adapter merged in, which `publish` renews: faster, at the
    memory of the adapted layers (on the CPU: of all layers). Without it the modules that train are used as they are.
    dtype, kv_cache_dtype: as in `[inference]`. path: how this model is decoded, and why, in one line.

    Raises ConfigError for a number format that this model or device does not have.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prefix_caching: bool = True,
        merged_copy: bool = True,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.policy = policy
        self.prefix_caching = prefix_caching
        self.decoder = open_decoder(policy, merged_copy=merged_copy, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
        self.policy_version, self.overlaps = 0, False

    @classmethod
    def of(cls, policy: Policy, section: InferenceConfig) -> PyTorchEngine:
        return cls(
            policy,
            prefix_caching=section.prefix_caching,
            merged_copy=section.merged_copy,
            dtype=section.dtype,
            kv_cache_dtype=section.kv_cache_dtype,
        )

    @property
    def path(self) -> str:
        return self.decoder.path

    def stage(self, version: int) -> None:
        """Nothing to keep: the adapter is in this process, and stays as it is until the sampling is over."""

    @torch.no_grad()
    def use(self, version: int) -> None:
        self.decoder.refresh()
        self.policy_version = version

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        groups, size = streams_PG.shape
        if groups == 0:
            # Others have some, and each pass through a sharded base is everybody's.
            prompts, streams_PG = [np.array(self.policy.eos_ids[:1])], np.zeros((1, size), dtype=np.uint64)
        noise_BT = torch.from_numpy(uniforms(streams_PG.reshape(-1), max_tokens)).to(self.policy.device)
        with self.policy.together.lockstep():
            if self.prefix_caching:
                logits_BV, rows = self.decoder.start(prompts, size, max_tokens)
            else:
                logits_BV, rows = self.decoder.start([p for p in prompts for _ in range(size)], 1, max_tokens)
        tokens_BT, logprobs_BT, lengths_B = decode(
            logits_BV, rows, noise_BT, temperature, self.policy.eos_ids, self.policy.together
        )
        done = [self._completion(t[:n], p[:n]) for t, p, n in zip(tokens_BT, logprobs_BT, lengths_B, strict=True)]
        return [tuple(done[p * size : (p + 1) * size]) for p in range(groups)]

    def _completion(self, tokens_T: np.ndarray, logprobs_T: np.ndarray) -> Completion:
        return Completion(
            tokens_T=tokens_T,
            logprobs_T=logprobs_T,
            finish_reason="stop" if tokens_T[-1] in self.policy.eos_ids else "length",
            policy_version=self.policy_version,
            text=self.policy.tokenizer.decode(tokens_T, skip_special_tokens=True),
        )


@torch.no_grad()
def open_decoder(policy: Policy, *, merged_copy: bool, dtype: str, kv_cache_dtype: str) -> Decoder:
    """The fastest decoder that computes what this model computes; see `PyTorchEngine` for the arguments."""
    if kv_cache_dtype == "fp8" and policy.device.type == "mps":
        raise ConfigError('inference.kv_cache_dtype = "fp8": Metal has no such format; use "bf16" or "auto"')
    own = policy.head.weight.dtype
    weights = WEIGHTS.get(dtype, own)
    if policy.is_sharded:
        merged_copy, why = False, 'backend.sharding = "fsdp"'
    else:
        why = obstacle(policy) if merged_copy else "inference.merged_copy = false"
    if why is None:
        fused = FusedDecoder(policy, weights)
        if reproduces(fused, policy):
            fused.cache_dtype = CACHES.get(kv_cache_dtype, weights)
            return fused
        why = "its fused form does not compute what the modules do"
    if kv_cache_dtype != "auto":
        raise ConfigError(
            f'inference.kv_cache_dtype = "{kv_cache_dtype}": this model is decoded through transformers\' modules, '
            f'whose cache has the format of the weights ({why}); use "auto"'
        )
    if not merged_copy and weights != own:
        raise ConfigError(f'inference.dtype = "{dtype}": only a merged copy has a format of its own; use "auto"')
    return ModuleDecoder(policy, MergedModules(policy.lm, weights) if merged_copy else None, why)


def reproduces(decoder: FusedDecoder, policy: Policy) -> bool:
    """Whether the decoder's logits are the model's own, on two prompts of different length and a token after each."""
    # From all over the vocabulary: its beginning often holds special tokens, on which half precision goes astray.
    ids = np.arange(1, 12) * policy.lm.config.vocab_size // 12
    prompts, after = [ids[:3], ids[3:10]], torch.from_numpy(ids[9:11]).to(policy.device)
    first, rows = decoder.start(prompts, 1, 2)
    ours = torch.stack((first, rows.step(after)), dim=1).float()
    theirs = torch.stack(
        [
            policy.lm(input_ids=torch.cat((torch.from_numpy(prompt).to(after), token[None]))[None]).logits[0, -2:]
            for prompt, token in zip(prompts, after, strict=True)
        ]
    ).float()
    tolerance = 1e-3 if decoder.dtype == torch.float32 else 5e-2
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


def decode(
    logits_BV: Tensor,
    rows: Rows,
    noise_BT: Tensor,
    temperature: float,
    eos_ids: Sequence[int],
    together: World = ALONE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and log-probs [B, T] and lengths [B]; row b is valid up to its length, end of sequence included.

    together: the ranks that decode at the same time, each its own rows, until all of them have ended.
    """
    count, limit = noise_BT.shape
    device = noise_BT.device
    noise_TB = noise_BT.T.contiguous()
    tokens_TB = torch.zeros(limit, count, dtype=torch.long, device=device)
    logprobs_TB = torch.zeros(limit, count, device=device)
    goes_on_V = torch.ones(logits_BV.shape[1], dtype=torch.bool, device=device)
    goes_on_V[list(eos_ids)] = False
    alive = torch.arange(count, device=device)  # the original row of each row still in the batch
    running = torch.ones(count, dtype=torch.bool, device=device)
    for t in range(limit):
        chosen, logprob = sample(logits_BV, noise_TB[t, alive], temperature)
        # Rows that ended but still ride along write behind their end, where nothing reads.
        tokens_TB[t, alive], logprobs_TB[t, alive] = chosen, logprob
        running &= goes_on_V[chosen]
        left = int(running.sum())
        if t + 1 == limit or not together.any(left > 0):
            break
        if 0 < left <= COMPACT_BELOW * len(running):
            keep = running.nonzero().squeeze(1)
            rows.keep(keep)
            alive, chosen, running = alive[keep], chosen[keep], running[keep]
        with together.lockstep():
            logits_BV = rows.step(chosen)
    if not logprobs_TB.isfinite().all():
        raise RetrainError(
            "the model's logits are not finite, so nothing can be sampled: the adapter has diverged, or the number "
            "format is too narrow. Go back to an earlier checkpoint, with a lower training.lr or in fp32"
        )
    ended_TB = ~goes_on_V[tokens_TB]
    lengths_B = torch.where(ended_TB.any(0), ended_TB.int().argmax(0) + 1, limit)
    return tokens_TB.T.cpu().numpy(), logprobs_TB.T.cpu().numpy(), lengths_B.cpu().numpy()


def sample(logits_BV: Tensor, noise_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens [B] by inversion of the cumulative distribution at `noise_B` in [0, 1), and their log-probs [B], float32.

    One uniform number a token makes the choice a function of the row's own stream. Temperature 0 takes the most likely.
    """
    logits_BV = logits_BV.float()
    p_BV = torch.softmax(logits_BV if temperature in (0, 1) else logits_BV / temperature, dim=-1)
    vocabulary = p_BV.shape[1]
    # Over a large vocabulary, softmax normalises by a sum that is off by 1e-5; this one is added up pairwise.
    total_B1 = p_BV.sum(dim=-1, keepdim=True)
    target_B1 = noise_B[:, None] * total_B1
    if temperature == 0:
        token_B1 = logits_BV.argmax(dim=-1, keepdim=True)
    elif vocabulary <= SMALL_VOCABULARY:
        token_B1 = _draw(p_BV.cumsum(-1), target_B1)
    else:
        # The cumulative sum over a whole vocabulary costs more than all the rest: add up blocks, then the one it is in.
        p_BNE = F.pad(p_BV, (0, -vocabulary % BLOCK)).unflatten(1, (-1, BLOCK))
        block_BN = p_BNE.sum(-1)
        sums_BN = block_BN.cumsum(-1)
        block_B1 = _draw(sums_BN, target_B1)
        left_B1 = target_B1 - (sums_BN.gather(1, block_B1) - block_BN.gather(1, block_B1))
        within_BE = p_BNE[torch.arange(len(p_BV), device=p_BV.device), block_B1[:, 0]]
        token_B1 = (block_B1 * BLOCK + _draw(within_BE.cumsum(-1), left_B1)).clamp(max=vocabulary - 1)
    # The logarithm of a probability that is clearly above 0 is as exact as log_softmax.
    return token_B1.squeeze(1), (p_BV.gather(1, token_B1) / total_B1).squeeze(1).log()


def _draw(sums_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The entry [B, 1] in whose share of the cumulative sums the target falls, between the first and the last entry of
    mass above zero: "right" passes over entries of none, as their cumulative value is their predecessor's."""
    # Rounding must leave the target neither below 0 nor at the total or above: nothing lies there. Just above 0, so
    # that no token is drawn whose probability float32 can hardly tell from 0.
    target_B1 = torch.minimum(target_B1.clamp(min=1e-30), sums_BN[:, -1:] * (1 - torch.finfo(torch.float32).eps))
    # Sums that are not finite have no entry at all; the log-prob of the one that is then taken tells.
    return torch.searchsorted(sums_BN, target_B1, right=True).clamp_(max=sums_BN.shape[1] - 1)
