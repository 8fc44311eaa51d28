"""DAPO's soft overlong penalty (arXiv 2503.14476, equation 13). Torch-free."""

from __future__ import annotations

from retrain.types import ConfigError


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """What is added to the reward of a completion of `length` tokens: in [-1, 0].

    0 up to max_tokens - buffer, then falling linearly to -1 at max_tokens, and -1 beyond. buffer = 0 leaves only the
    cliff beyond max_tokens. Raises ConfigError unless 0 <= buffer <= max_tokens.
    """
    if not 0 <= buffer <= max_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer = {buffer} must lie in [0, {max_tokens}], up to training.max_tokens"
        )
    over = length - (max_tokens - buffer)
    if over <= 0:
        return 0.0
    return -1.0 if length > max_tokens else -over / buffer
