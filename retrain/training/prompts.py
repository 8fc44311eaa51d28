"""Examples to prompt tokens, and the check that every one of them fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrain.types import ConfigError, Example


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    context: int,
    max_tokens: int,
    max_prompt_tokens: int,
    say: Callable[[str], None],
) -> tuple[list[Example], list[np.ndarray]]:
    """Templated prompts as int64 token ids, for the examples that `max_prompt_tokens` (0 = no cap) admits.

    Uses the tokenizer's chat template (one user turn, generation prompt added) where it has one, else the plain text.
    Raises ConfigError when a prompt and `max_tokens` do not fit the model's context, or when none is left.
    """
    if not examples:
        return [], []
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": example.prompt}] for example in examples]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    else:
        texts = [example.prompt for example in examples]
    encoded = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    kept = [
        (example, np.array(ids, dtype=np.int64))
        for example, ids in zip(examples, encoded, strict=True)
        if not max_prompt_tokens or len(ids) <= max_prompt_tokens
    ]
    left_out = len(examples) - len(kept)
    if not kept:
        shortest = min(map(len, encoded))
        raise ConfigError(
            f"every prompt is longer than training.max_prompt_tokens = {max_prompt_tokens}: raise it, the shortest has "
            f"{shortest} tokens"
        )
    if left_out:
        say(f"{left_out} of {len(examples)} examples are left out: longer than training.max_prompt_tokens")
    _check_lengths(kept, context, max_tokens)
    return [example for example, _ in kept], [ids for _, ids in kept]


def _check_lengths(kept: Sequence[tuple[Example, np.ndarray]], context: int, max_tokens: int) -> None:
    shortest, longest = (pick(kept, key=lambda item: len(item[1])) for pick in (min, max))
    if len(shortest[1]) == 0:
        raise ConfigError(f"the prompt {shortest[0].prompt[:60]!r} has no tokens; the model needs at least one")
    room = context - max_tokens
    if len(longest[1]) <= room:
        return
    remedy = "lower training.max_tokens"
    if room >= len(shortest[1]):
        remedy += f", or leave such prompts out with training.max_prompt_tokens = {room}"
    raise ConfigError(
        f"a prompt of {len(longest[1])} tokens (the longest) and training.max_tokens = {max_tokens} do not fit the "
        f"model's context of {context}: {remedy}. It begins {longest[0].prompt[:60]!r}"
    )
