"""Sampling at a Tinker service, from the policy that its backend trains there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from retrain.backend.tinker import wire
from retrain.http import BadAnswer
from retrain.inference import Engine
from retrain.inference.checks import check_sample
from retrain.inference.dialects import Ask, Sample
from retrain.types import Completion, RetrainError

if TYPE_CHECKING:
    from retrain.backend.tinker import TinkerBackend

# A group's completions have seeds that follow each other; there is room for them below 2**31.
SEEDS = 2**30


class TinkerEngine(Engine):
    """See `retrain.inference.Engine`. A group is one request, so that its prompt is computed once; the group's first
    stream keys the noise of all of it. Until something is published, the base model answers."""

    def __init__(self, backend: TinkerBackend) -> None:
        self.backend = backend
        self.policy_version, self.overlaps = 0, False
        self._sampler: Any = None
        self._samplers: dict[int, Any] = {}

    def stage(self, version: int) -> None:
        """Raises ServerLost, RetrainError."""
        if version not in self._samplers:
            self._samplers[version] = self.backend.open_sampler()

    def use(self, version: int) -> None:
        self._sampler = self._samplers[version]
        self._samplers = {staged: sampler for staged, sampler in self._samplers.items() if staged >= version}
        self.policy_version = version

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        """Raises ServerLost, and RetrainError for an answer that cannot have been sampled as it was asked for."""
        if self._sampler is None:
            self._sampler = self.backend.open_base_sampler()
        calls = [
            partial(
                self._sampler.sample,
                wire.prompt(prompt),
                len(streams),
                wire.sampling(
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=int(streams[0]) % SEEDS,
                    stop_ids=self.backend.eos_ids,
                ),
            )
            for prompt, streams in zip(prompts, streams_PG, strict=True)
        ]
        answers = self.backend.service.gather(calls, at_once=self.backend.config.backend.max_concurrent)
        return [
            self._group(answer.sequences, prompt, len(streams), max_tokens)
            for answer, prompt, streams in zip(answers, prompts, streams_PG, strict=True)
        ]

    def _group(self, found: Sequence[Any], prompt: np.ndarray, size: int, max_tokens: int) -> tuple[Completion, ...]:
        if len(found) != size:
            raise RetrainError(f"the service returned {len(found)} completions, {size} were asked for")
        return tuple(self._completion(sequence, prompt, max_tokens) for sequence in found)

    def _completion(self, found: Any, prompt: np.ndarray, max_tokens: int) -> Completion:
        stopped = found.stop_reason == "stop"
        sample = Sample(list(found.tokens), list(found.logprobs or ()), stopped, served_by=None)
        try:
            check_sample(sample, self._asked(prompt, max_tokens), self.backend.vocab_size)
        except BadAnswer as error:
            raise RetrainError(f"{self.backend.service.name}: {error}") from error
        return Completion(
            np.array(sample.tokens, dtype=np.int64),
            np.minimum(np.array(sample.logprobs, dtype=np.float32), 0),
            "stop" if stopped else "length",
            self.policy_version,
            self.backend.tokenizer.decode(sample.tokens, skip_special_tokens=True),
        )

    def _asked(self, prompt: np.ndarray, max_tokens: int) -> Ask:
        stop_ids = list(self.backend.eos_ids)
        return Ask(prompt.tolist(), "", None, max_tokens, temperature=1.0, seed=0, stop_ids=stop_ids)

    def close(self) -> None:
        self.backend.service.close()
