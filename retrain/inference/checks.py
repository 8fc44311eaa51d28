"""What a server engine checks before it believes: the served model, every completion."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrain.assets import resolve_model
from retrain.http import BadAnswer
from retrain.inference.dialects import Ask, Sample
from retrain.types import ConfigError

# A log-prob may come out above 0 by rounding, never by more.
ROUNDING = 1e-6


def choose_model(url: str, model: str, listed: Sequence[dict[str, Any]]) -> tuple[str, int | None]:
    """(name, context) of the base model among what /v1/models lists: the one that `model.model` names, or the only one.

    A server may call its model as it likes: whether it is the right one is proven by its log-probs, not by its name.
    """
    wanted = resolve_model(model)
    names = {model, wanted, str(Path(wanted).expanduser().resolve())}
    bases = [entry for entry in listed if not entry.get("parent")]
    chosen = [entry for entry in bases if names & {entry["id"], entry.get("root")}] or bases
    if len({entry.get("root") or entry["id"] for entry in chosen}) != 1:
        others = ", ".join(str(entry["id"]) for entry in bases[:5]) or "no base model"
        raise ConfigError(
            f"inference.url: {url} serves {others}, and none of them is model.model = {model}. Start it with that "
            "model, or write its name there"
        )
    context = chosen[0].get("max_model_len")
    return chosen[0]["id"], context if isinstance(context, int) else None


def check_sample(sample: Sample, ask: Ask, vocab_size: int) -> None:
    """Raises BadAnswer for a completion that cannot have been sampled as it was asked for."""
    count = len(sample.tokens)
    if ask.adapter is not None and sample.served_by not in (None, ask.adapter.name):
        raise BadAnswer(f"the completion is from {sample.served_by}, {ask.adapter.name} was asked for")
    if count == 0:
        raise BadAnswer("the completion is empty")
    if len(sample.logprobs) != count:
        raise BadAnswer(f"{len(sample.logprobs)} log-probs came with {count} tokens")
    if count > ask.max_tokens:
        raise BadAnswer(f"{count} tokens came, {ask.max_tokens} at most were asked for")
    for token in sample.tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadAnswer(f"token id {token!r} is not in the vocabulary of {vocab_size}")
    check_logprobs(sample.logprobs)
    if not sample.stopped and count < ask.max_tokens and sample.tokens[-1] not in ask.stop_ids:
        raise BadAnswer(f"the completion was cut after {count} of {ask.max_tokens} tokens")


def check_logprobs(logprobs: Sequence[Any]) -> None:
    """Raises BadAnswer unless all are finite and at most 0."""
    for logprob in logprobs:
        # A comparison with NaN is false.
        if type(logprob) not in (int, float) or not -sys.float_info.max <= logprob <= ROUNDING:
            raise BadAnswer(f"{logprob!r} is no log-probability")
