"""The Backend at a Tinker service: the adapter lives there, its optimizer and its full states too."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from retrain.algorithm.schedule import learning_rate
from retrain.algorithm.uncertainty import resolve
from retrain.assets import resolve_model
from retrain.backend.devices import peak_memory_bytes
from retrain.backend.figures import combined, credit_of_tokens, logprob_gap, token_statistics, uncertainty_summary
from retrain.backend.tinker import wire
from retrain.backend.tinker.archive import unpack_adapter
from retrain.backend.tinker.service import Service
from retrain.backend.tinker.update import CPU, Update, check_gap, measured, prepare
from retrain.backend.tinker.vocabulary import load_vocabulary
from retrain.config.service import KINDS, Reduction
from retrain.streams import stream_key
from retrain.types import SERVICE_STATE, Batch, RetrainError, ServerLost, StepResult

if TYPE_CHECKING:
    from retrain.config import Config

# Weights that are fetched at once need not be kept for long.
FETCH_SECONDS = 3600


@dataclass(frozen=True)
class _State:
    """A full state of the adapter as it is, at the service. future: of an answer that names its path.

    lasting: whether the service keeps it until somebody deletes it.
    """

    future: Any
    lasting: bool


class TinkerBackend:
    """See `retrain.backend.Backend`. Samples come from `open_sampler()`, which has the adapter as it is then."""

    def __init__(self, config: Config, *, seed: int, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.reduction: Reduction = KINDS[config.backend.service].reduction
        self.uncertainty = resolve(config.algorithm.uncertainty, has_entropy=False)
        if config.algorithm.uncertainty == "auto":
            say('uncertainty: "surprisal": a Tinker service gives log-probabilities, and no entropy')
        self.service = Service(config.model.base_url, config.backend, say)
        name = config.model.model
        self.base_model, longest = self.service.base_model((name, resolve_model(name)), name)
        vocabulary = load_vocabulary(config.model)
        self.tokenizer, self.eos_ids, self.vocab_size = vocabulary.tokenizer, vocabulary.eos_ids, vocabulary.vocab_size
        self.context = min(vocabulary.context, longest or vocabulary.context)
        self.training: Any = self.service.first(
            lambda: self.service.client.create_lora_training_client(
                base_model=self.base_model,
                rank=config.model.lora_rank,
                seed=stream_key(seed, "lora") % 2**31,
                # As in this process: the output head stays frozen.
                train_unembed=False,
            )
        )
        say(f"training at {self.service.name}: {self.base_model} as {self.training.model_id}")
        self._state: _State | None = None
        self._adapter: str | None = None
        self._names = 0
        self._in_step = False

    def step(self, batch: Batch, step: int) -> StepResult:
        """Every update of the step is sent before the first is answered. Raises ServerLost, RetrainError.

        Whatever it raises, whether the service has made the step is not known: the run's state is what was kept before.
        """
        loss, training = self.config.loss, self.config.training
        rate = learning_rate(
            step,
            base=training.lr,
            schedule=training.lr_schedule,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
        )
        parts = [
            members
            for part in range(loss.minibatches)
            if (members := range(part, len(batch.rollouts), loss.minibatches))
        ]
        updates = [
            prepare(batch, members, self.config, uncertainty=self.uncertainty, reduction=self.reduction)
            for members in parts
        ] * loss.epochs
        self._in_step = True
        sent = [self._send(update, rate, first=i == 0) for i, update in enumerate(updates)]
        state = self._keep(lasting=(step + 1) % training.save_every == 0)
        answers = [(self.service.wait(forward), self.service.wait(optim)) for forward, optim in sent]
        figures, records = [], []
        for update, (forward, optim) in zip(updates, answers, strict=True):
            sums, passes = measured(update, wire.logprobs(forward), self.config)
            figures.append(sums | wire.grad_norm(optim))
            records.append(passes)
        self._state, self._adapter, self._in_step = state, None, False
        passes = [record for part in records[: len(parts)] for record in part]
        metrics = {"lr": rate} | combined(figures) | logprob_gap(records[0]) | token_statistics(passes)
        return StepResult(metrics, uncertainty_summary(passes), credit_of_tokens(passes))

    def _send(self, update: Update, rate: float, *, first: bool) -> tuple[Any, Any]:
        """Futures of the two halves of an update."""
        forward = self.training.forward_backward(
            [wire.datum(datum, with_weights=self.reduction == "sequence_mean") for datum in update.datums],
            self.config.loss.kind,
            wire.loss_config(self.config.loss),
        )
        limit = self.config.inference.max_logprob_gap
        if first and limit > 0:
            # No update is to be made where it is exceeded: this one half is waited for.
            check_gap(measured(update, wire.logprobs(self.service.wait(forward)), self.config)[1], limit)
        return forward, self.training.optim_step(wire.adam(self.config, rate))

    def _keep(self, *, lasting: bool) -> _State | None:
        """Have the service keep the state that it will have by then. None where the config wants none in between."""
        seconds = self.config.backend.state_ttl_s
        if not (lasting or seconds):
            return None
        return _State(self.training.save_state(self._name("state"), None if lasting else seconds), lasting)

    def _name(self, what: str) -> str:
        """A name of its own for each thing that the service keeps of this session."""
        self._names += 1
        return f"{what}_{self._names:06d}"

    def open_sampler(self) -> Any:
        """A sampling client with the adapter as it is now. Raises ServerLost, RetrainError."""
        return self.service.call(self.training.save_weights_and_get_sampling_client)

    def open_base_sampler(self) -> Any:
        """A sampling client with the base model alone."""
        return self.service.call(lambda: self.service.client.create_sampling_client(base_model=self.base_model))

    def logprobs(
        self,
        prompt_tokens: np.ndarray,
        completion_tokens: np.ndarray,
        *,
        temperature: float = 1.0,
        adapter: bool = True,
    ) -> np.ndarray:
        """Raises RetrainError for another temperature than 1, at which the service computes."""
        if temperature != 1:
            raise RetrainError(f"a Tinker service computes log-probabilities at temperature 1, not {temperature:g}")
        sampler = self.open_sampler() if adapter else self.open_base_sampler()
        tokens = np.concatenate((prompt_tokens, completion_tokens))
        found = self.service.wait(sampler.compute_logprobs(wire.prompt(tokens)))
        return np.array(found[-len(completion_tokens) :], dtype=np.float32)

    def save_adapter(self, folder: Path) -> None:
        """Raises ServerLost, RetrainError."""
        if self._adapter is None:
            saved = self.training.save_weights_for_sampler(self._name("adapter"), FETCH_SECONDS)
            self._adapter = self.service.wait(saved).path
        base = resolve_model(self.config.model.model)
        assert self._adapter is not None
        self.service.download(self._adapter, folder, lambda archive: unpack_adapter(archive, folder, base))

    def load_adapter(self, folder: Path) -> None:
        raise RetrainError(
            f"a Tinker service takes no adapter from a file ({folder}). Evaluate it in this process: --backend local"
        )

    def save(self, folder: Path) -> None:
        """The state stays at the service, and `folder` names it; a copy of the adapter comes along.

        After a failure the folder names what the service has kept of the last whole step, without a copy. Raises
        ServerLost where that is nothing.
        """
        state = self._kept_state() if self._in_step else self._lasting_state()
        facts = {"state": self.service.wait(state.future).path, "lasting": state.lasting}
        facts |= {"service": self.service.name, "training_run": self.training.model_id}
        (folder / SERVICE_STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if self._in_step:
            return
        try:
            self.save_adapter(folder)
        except ServerLost as lost:
            self.say(f"the checkpoint is without a copy of the adapter, its state is at the service: {lost}")

    def _lasting_state(self) -> _State:
        if self._state is not None and self._state.lasting:
            return self._state
        lasting = self._keep(lasting=True)
        assert lasting is not None
        try:
            self.service.wait(lasting.future)
        except ServerLost:
            return self._kept_state()
        self._state = lasting
        return lasting

    def _kept_state(self) -> _State:
        """That of the last whole step: a step that failed half-way may have been made or not."""
        if self._state is None:
            raise self.service.lost("it has kept no state since the last checkpoint (backend.state_ttl_s = 0)")
        if not self._state.lasting:
            self.say(f"the service keeps this state for {self.config.backend.state_ttl_s} s: resume the run within")
        return self._state

    def load(self, folder: Path) -> None:
        """Raises RetrainError where the service no longer has the state, ServerLost."""
        facts = json.loads((folder / SERVICE_STATE).read_bytes())
        try:
            self.service.wait(self.training.load_state_with_optimizer(facts["state"]))
        except ServerLost:
            raise
        except RetrainError as error:
            kept = "" if facts["lasting"] else ", which was to be kept for a limited time only"
            raise RetrainError(
                f"{error}\nThe state that {folder / SERVICE_STATE} names{kept}, could not be taken up. Resume an "
                "earlier checkpoint"
            ) from error
        known: Future[Any] = Future()
        known.set_result(SimpleNamespace(path=facts["state"]))
        self._state, self._adapter = _State(known, facts["lasting"]), None

    def describe(self) -> dict[str, Any]:
        return {
            "parameters": None,
            "trainable_parameters": None,
            "device": "cpu",  # of what runs here
            "dtype": None,
            "service": self.service.name,
            "training_run": self.training.model_id,
        }

    def base_digest(self) -> str | None:
        return None

    def figures(self) -> dict[str, float | None]:
        return self.service.figures()

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(CPU)
