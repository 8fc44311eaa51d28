"""Proof of serving: whether a server's log-probabilities are those of the policy that was published to it.

Two readings are taken at every publication. *Scored*: a fixed text's log-probs at temperature 1, computed without the
prefix cache; being the same tokens every time, they tell a server that stayed with the old adapter from one whose
update was small. *Sampled*: a completion after a fixed prompt, at the run's temperature and through the prefix cache,
as the run's own completions are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from retrain.config import InferenceConfig

TEXT = (
    "A train leaves the station at 9:40 and arrives at 12:15. How long does the journey take? Let me think step by "
    "step. From 9:40 to 12:00 there are 140 minutes, and 15 more make 155, which is 2 hours and 35 minutes. "
    "Wait, let me check: 155 = 2 * 60 + 35. The answer is \\boxed{155}."
)
# For the tokenizers: what they treat differently.
TOKENIZER_TEXT = TEXT + "\n\n\tnaïve café — 3.14159e-5, x_1^2 != y; 12345678 北京 🙂 def f(x):\n        return x  \r\n"
PROMPT_TOKENS, SCORED_TOKENS, SAMPLED_TOKENS = 48, 32, 4
SAMPLED_STREAM = 20_011

# Nats by which a token's log-prob may differ from the trainer's, by the coarsest number format on either side. Two
# float32 implementations differ by some 1e-6 and are held to a thousand times that. With 8 bits of mantissa single
# tokens differ by tenths; weights of 8 and of 4 bits are another model.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "8 bits": 1.0, "4 bits": 2.0}
# A server whose numbers did not move in the last bit while the trainer's moved by this share of the tolerance still
# has the old adapter: even in bfloat16 some of the log-prob's terms would have been rounded to the other side.
MOVED = 0.01


@dataclass(frozen=True)
class Probe:
    """prompt, continuation: token ids of the fixed text."""

    prompt: np.ndarray
    continuation: np.ndarray

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.tolist(), *self.continuation.tolist()]


def make_probe(tokenizer: Any, context: int) -> Probe:
    """The fixed text in this tokenizer's ids, cut to a context of `context` >= 4 tokens."""
    ids = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"], dtype=np.int64)
    prompt = min(PROMPT_TOKENS, len(ids) // 2, context // 2)
    return Probe(ids[:prompt], ids[prompt : min(prompt + SCORED_TOKENS, context - 1)])


def number_format(trainer_dtype: str, section: InferenceConfig) -> str:
    """The coarsest of the formats that the trainer and, by the config, the server compute in: a key of TOLERANCE."""
    if section.dtype == "fp4":
        return "4 bits"
    if section.dtype == "fp8" or section.kv_cache_dtype in ("fp8", "int8"):
        return "8 bits"
    plain = trainer_dtype == "float32" and section.dtype == "auto" and section.kv_cache_dtype == "auto"
    return "float32" if plain else "bfloat16"


@dataclass(frozen=True)
class Claim:
    """What a reading is held against. server: its url. format: key of TOLERANCE. model: as the config names it, and as
    the server does. same_dtype, enable_temperature: the dialect's remedies."""

    server: str
    version: int
    format: str
    model: tuple[str, str]
    same_dtype: str
    enable_temperature: str


@dataclass(frozen=True)
class Scores:
    """The continuation's log-probs, float32 [T]: as the server has them, and as the trainer."""

    served: np.ndarray
    expected: np.ndarray


def gap(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Largest distance, in nats."""
    return float(np.max(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))))


def is_stale(now: Scores, before: Scores, tolerance: float) -> bool:
    """Whether the server answers as it did before, although the trainer has moved.

    before: the reading at which the server's numbers last changed, so that many small steps add up.
    """
    if np.array_equal(now.served, before.served):
        return gap(now.expected, before.expected) > MOVED * tolerance
    now_gap, before_gap = gap(now.served, now.expected), gap(now.served, before.expected)
    return now_gap > tolerance >= before_gap


def score_complaint(now: Scores, before: Scores | None, claim: Claim) -> str | None:
    """Why the server cannot have the adapter that was published to it; None where its scores are right."""
    tolerance, distance = TOLERANCE[claim.format], gap(now.served, now.expected)
    if before is not None and is_stale(now, before, tolerance):
        return (
            f"{claim.server} did not take up policy version {claim.version}, which it said it had loaded: it serves "
            f"the adapter of before. The trainer's log-probabilities of a fixed text moved by up to "
            f"{gap(now.expected, before.expected):.2g} nats, the server's by {gap(now.served, before.served):.2g}"
        )
    if distance <= tolerance:
        return None
    ours, theirs = claim.model
    return (
        f"{claim.server} does not serve policy version {claim.version}: its log-probabilities of a fixed text differ "
        f"from the trainer's by up to {distance:.2g} nats, {tolerance:g} are allowed in {claim.format}. Either it has "
        f"another model than {ours} (it calls it {theirs}), or it ignores the adapter, or it computes in another "
        f"number format: then {claim.same_dtype}, or set inference.dtype to the format it has"
    )


def base_complaint(sampled: Sequence[float], expected: np.ndarray, claim: Claim) -> str | None:
    """Why the server cannot have the base model; None where its log-probs of what it sampled are right.

    sampled: the server's, at temperature 1. expected: the trainer's of the same tokens, without an adapter.
    """
    tolerance, distance = TOLERANCE[claim.format], gap(sampled, expected)
    if distance <= tolerance:
        return None
    ours, theirs = claim.model
    return (
        f"{claim.server} does not serve {ours}: its log-probabilities of what it samples differ from the model's by up "
        f"to {distance:.2g} nats, {tolerance:g} are allowed in {claim.format}. Either it has another model (it calls "
        f"it {theirs}), or it computes in another number format: then {claim.same_dtype}, or set inference.dtype to "
        "the format it has"
    )


def sample_complaint(
    sampled: Sequence[float], expected: np.ndarray, at_one: np.ndarray, temperature: float, claim: Claim
) -> str | None:
    """Why the log-probs of a sampled completion cannot be those it was sampled with; None where they are right.

    sampled: the server's. expected, at_one: the trainer's of the same tokens, at the run's temperature and at 1.
    """
    # Differences of logits are divided by the temperature, too.
    tolerance = TOLERANCE[claim.format] / min(1.0, temperature)
    distance = gap(sampled, expected)
    if distance <= tolerance:
        return None
    if gap(sampled, at_one) <= TOLERANCE[claim.format]:
        return (
            f"{claim.server} reports log-probabilities at temperature 1, not at training.temperature = {temperature:g} "
            f"(they differ by up to {distance:.2g} nats): {claim.enable_temperature}"
        )
    return (
        f"{claim.server} misreports what it samples from policy version {claim.version}: log-probabilities of sampled "
        f"tokens differ from the trainer's by up to {distance:.2g} nats, {tolerance:.2g} are allowed in "
        f"{claim.format}. Either a prefix cache has outlived the adapter it was computed with, or its sampler changes "
        f"the distribution ({claim.enable_temperature}), or it computes in another number format ({claim.same_dtype})"
    )


def return_complaint(
    server: str, version: int, got: Sequence[float] | np.ndarray, expected: np.ndarray, tolerance: float
) -> str | None:
    """Why a server that was away cannot be the one that it was; None where its log-probs are those expected."""
    distance = gap(got, expected)
    if distance <= tolerance:
        return None
    return (
        f"{server} was restarted and is another server now: with policy version {version} its log-probabilities of a "
        f"fixed text differ from the trainer's by up to {distance:.2g} nats. Start it with the same model and options, "
        "and resume the run"
    )
