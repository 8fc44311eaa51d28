"""Examples to prompt tokens, and the check that every one of them fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from retrain.types import ConfigError, Example

T = TypeVar("T")


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
    pairs = [(example, np.array(ids, dtype=np.int64)) for example, ids in zip(examples, encoded, strict=True)]
    limits = {"context": context, "max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
    kept = admit(pairs, lambda pair: pair[1], lambda pair: pair[0].prompt, **limits, say=say)
    return [example for example, _ in kept], [ids for _, ids in kept]


def admit(
    asked: Sequence[T],
    tokens: Callable[[T], np.ndarray],
    text: Callable[[T], str],
    *,
    context: int,
    max_tokens: int,
    max_prompt_tokens: int,
    say: Callable[[str], None],
) -> list[T]:
    """Those of `asked` whose prompt, `tokens(one)`, `max_prompt_tokens` admits; `text(one)` is for messages.

    Raises ConfigError when a prompt and `max_tokens` do not fit the model's context, or when none is left.
    """
    if not asked:
        return []
    kept = [one for one in asked if not max_prompt_tokens or len(tokens(one)) <= max_prompt_tokens]
    if not kept:
        shortest = min(len(tokens(one)) for one in asked)
        raise ConfigError(
            f"every prompt is longer than training.max_prompt_tokens = {max_prompt_tokens}: raise it, the shortest has "
            f"{shortest} tokens"
        )
    if len(kept) < len(asked):
        left_out = len(asked) - len(kept)
        say(f"{left_out} of {len(asked)} examples are left out: longer than training.max_prompt_tokens")
    _check_lengths([(text(one), len(tokens(one))) for one in kept], context, max_tokens)
    return kept


def _check_lengths(kept: Sequence[tuple[str, int]], context: int, max_tokens: int) -> None:
    """kept: text and number of tokens of each prompt."""
    (empty, shortest), (beginning, longest) = (pick(kept, key=lambda prompt: prompt[1]) for pick in (min, max))
    if shortest == 0:
        raise ConfigError(f"the prompt {empty[:60]!r} has no tokens; the model needs at least one")
    room = context - max_tokens
    if longest <= room:
        return
    remedy = "lower training.max_tokens"
    if room >= shortest:
        remedy += f", or leave such prompts out with training.max_prompt_tokens = {room}"
    raise ConfigError(
        f"a prompt of {longest} tokens (the longest) and training.max_tokens = {max_tokens} do not fit the model's "
        f"context of {context}: {remedy}. It begins {beginning[:60]!r}"
    )
