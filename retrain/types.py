"""The values that travel through a training step. Frozen, torch-free, shapes in the docstrings.

Shape suffixes: P prompts (groups) of a step, G completions of one prompt, T tokens of one completion.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]

# The file of a checkpoint that names what a service keeps for it.
SERVICE_STATE = "service.json"


class RetrainError(Exception):
    """A failure the user can act on: one message with the place and the remedy. Exit status 1."""

    exit_status = 1


class ConfigError(RetrainError):
    """Wrong usage or configuration, found before anything was started or written. Exit status 2."""

    exit_status = 2


class ServerLost(RetrainError):
    """A server went away, or answers nothing usable, for longer than the config allows.

    Raised while completions are sampled it leaves the run as it was after its last step, which may be saved.
    """


@dataclass(frozen=True)
class Example:
    """One problem: the prompt's text as the user would write it, and the reference its reward compares with.

    Raises ValueError for an empty prompt, for anything but strings, and for text that is not Unicode (lone surrogates).
    """

    prompt: str
    reference: str

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("reference", self.reference)):
            if not isinstance(value, str):
                raise ValueError(f"the {name} must be a string, this is {type(value).__name__}")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the {name} holds half of a surrogate pair, which is not text") from None
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")

    @cached_property
    def id(self) -> str:
        """16 hex digits of the SHA-256 of the content: the same example has the same id in every run."""
        return hashlib.sha256(f"{self.prompt}\0{self.reference}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """One sampled answer, as the sampler produced it: what was sampled is what is trained.

    tokens_T: int64 token ids, the end-of-sequence token included when the model emitted it.
    logprobs_T: float32 log-probability of each token under the sampling distribution (at the sampling temperature).
    sampled_T: bool; False where an environment wrote the token, which is context and never trained on (its log-prob is
    0 and means nothing). None: all were sampled.
    finish_reason: "stop" (the model ended it) or "length" (cut at max_tokens).
    policy_version: version of the adapter that sampled it.
    text: the decoded tokens, special tokens left out.
    """

    tokens_T: np.ndarray
    logprobs_T: np.ndarray
    finish_reason: FinishReason
    policy_version: int
    text: str
    sampled_T: np.ndarray | None = None

    def __len__(self) -> int:
        """Tokens that the model sampled."""
        return len(self.tokens_T) if self.sampled_T is None else int(self.sampled_T.sum())


@dataclass(frozen=True)
class Group:
    """The G completions sampled for one prompt, with the verdicts on them.

    index: ordinal of the prompt in the run (with the seed, it keys the sampling noise).
    prompt_tokens: int64 token ids of the templated prompt; stored once, completions refer to it.
    rewards_G: float, or None where the reward could not be computed (never the same thing as 0).
    errors_G: why a reward is None, else None.
    parts_G: (name, value) of each of `[[reward.parts]]`, () where there are none.
    """

    index: int
    example: Example
    prompt_tokens: np.ndarray
    completions: tuple[Completion, ...]
    rewards_G: tuple[float | None, ...] = ()
    errors_G: tuple[str | None, ...] = ()
    parts_G: tuple[tuple[tuple[str, float | None], ...], ...] = ()


@dataclass(frozen=True)
class Score:
    """A reward's verdict on one response: a value, or None with the reason why it could not be computed.

    parts: (name, value) of each reward that it is the weighted sum of.
    """

    value: float | None
    error: str | None = None
    parts: tuple[tuple[str, float | None], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """A completion that goes into training: its tokens, its episode advantage and which of its tokens plan.

    group: position of its prompt in Batch.prompts. planning_T: bool. sampled_T: as in Completion; the other tokens are
    context: they have no part in loss, credit or statistics.
    """

    group: int
    tokens_T: np.ndarray
    logprobs_T: np.ndarray
    advantage: float
    planning_T: np.ndarray
    sampled_T: np.ndarray | None = None

    def __len__(self) -> int:
        """Tokens that are trained on."""
        return len(self.tokens_T) if self.sampled_T is None else int(self.sampled_T.sum())


@dataclass(frozen=True)
class Batch:
    """What one optimizer step trains on. Each prompt stands once; rollouts refer to it by position.

    Example: prompts = (p0, p1), rollouts = (r(group=0), r(group=0), r(group=1)): three completions of two prompts.
    """

    prompts: tuple[np.ndarray, ...]
    rollouts: tuple[Rollout, ...]
    sepa_lambda: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Unmasked completion tokens: the denominator of `token_mean`."""
        return sum(map(len, self.rollouts))


@dataclass(frozen=True)
class StepResult:
    """What the learner reports of one step; every number is finite.

    uncertainty: (mean, max) over the tokens of each rollout, in the batch's order.
    credit: (advantages, uncertainty) of each rollout's tokens that are trained on, float32 each, in the same order.
    skipped: what was not finite, where the step was taken back; culprits: positions of the rollouts where it showed.
    """

    metrics: dict[str, float | None] = field(default_factory=dict)
    uncertainty: tuple[tuple[float, float], ...] = ()
    credit: tuple[tuple[np.ndarray, np.ndarray], ...] = field(default=(), compare=False)
    skipped: str | None = None
    culprits: tuple[int, ...] = ()
