"""How many tokens a step samples and trains on, and how they are packed, from the config alone: upper bounds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from retrain.config import Config

# Length of a prompt where the config sets no cap: the true one is known only when the data is read. Those of the
# built-in sums are short: 13 tokens on builtin:tiny, and in words 49 on SmolLM2.
PROMPT_TOKENS = 256
SHORT_PROMPTS = {"arithmetic": 13, "arithmetic:words": 64}
# What a token costs apart from attention: see retrain.backend.packing, which decides by it how many completions share a
# row.
TOKEN_COST = 2500
ITEM_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Rows:
    """A micro-batch: `count` rows of `width` tokens. trained: tokens that have a loss. shared: whether rows hold
    several completions, so that attention takes a mask."""

    count: int
    width: int
    trained: int
    shared: bool

    @property
    def tokens(self) -> int:
        return self.count * self.width


def prompt_tokens(config: Config) -> int:
    """Tokens a prompt is taken to have."""
    return config.training.max_prompt_tokens or SHORT_PROMPTS.get(config.data.source, PROMPT_TOKENS)


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


def base_dtype(config: Config, device: str | None = None) -> str:
    """Number format of the base model, a key of ITEM_BYTES."""
    dtype, device = config.training.dtype, device or config.backend.devices.split(",")[0].strip()
    return dtype if dtype != "auto" else ("fp32" if device == "cpu" else "bf16")


def micro_batches(config: Config, prompts: int) -> list[Rows]:
    """The kinds of full micro-batch that `prompts` groups make when every completion is as long as it may be.

    It follows retrain.backend.packing: completions of a group are spread over the number of rows that costs least, and
    rows of one width go together.
    """
    prompt, length, budget = prompt_tokens(config), config.training.max_tokens, config.training.micro_batch_tokens
    size = math.ceil(config.training.group_size / config.loss.minibatches)
    wanted = max(1, round(size * length / math.sqrt(prompt * (prompt + TOKEN_COST))))
    kinds = Counter(_completions_of_rows(size, length, size * length / wanted, budget - prompt))
    found = []
    for completions, count in kinds.items():
        width = prompt + completions * length
        together = min(prompts * count, max(1, budget // width))
        found.append(Rows(together, width, together * completions * length, completions > 1))
    return found


def _completions_of_rows(size: int, length: int, share: float, most: int) -> list[int]:
    """How many completions of `length` tokens each row of a group holds. share, most: tokens of them that it should,
    and may, have."""
    rows: list[int] = []
    for i in range(size):
        # As in packing: a completion goes where its middle falls.
        if rows and (i + 0.5) * length <= share * len(rows) and (rows[-1] + 1) * length <= most:
            rows[-1] += 1
        else:
            rows.append(1)
    return rows
