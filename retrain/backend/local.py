"""`backend = "local"`: PyTorch and PEFT in this process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retrain.backend import ranks, rng, snapshot, trainer_state
from retrain.backend.devices import kernels_on, peak_memory_bytes, resolve_devices
from retrain.backend.learner import Learner
from retrain.backend.model import base_digest, load_policy
from retrain.distributed import ALONE, World
from retrain.streams import stream_key
from retrain.types import Batch, RetrainError, StepResult
from retrain_kernels import linear_logprob

if TYPE_CHECKING:
    from retrain.config import Config

T = TypeVar("T")

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class LocalBackend:
    """See `retrain.backend.Backend`. The in-process engine samples from `policy` itself: nothing is copied."""

    def __init__(self, config: Config, *, seed: int, say: Callable[[str], None], world: World = ALONE) -> None:
        self.config, self.seed, self.world, self._leads = config, seed, world, False
        _, device, processes = resolve_devices(config.backend, say)
        self.policy = load_policy(
            config.model,
            config.lora,
            config.training,
            device,
            lora_seed=stream_key(seed, "lora"),
            say=say,
            processes=processes,
            sharded_over=world if config.backend.sharding == "fsdp" else None,
        )
        self.tokenizer, self.context = self.policy.tokenizer, self.policy.context
        self.eos_ids, self.vocab_size = self.policy.eos_ids, self.policy.head.weight.shape[0]
        self.learner = Learner(self.policy, config, world)
        self.uncertainty = self.learner.uncertainty
        self.kernels, obstacle = kernels_on(self.policy.device)
        if self.policy.device.type == "cuda" and obstacle:
            say(f"the fused kernels cannot run, plain PyTorch takes their place: {obstacle}")
        rng.seed_all(stream_key(seed, "global"))

    def step(self, batch: Batch, step: int) -> StepResult:
        if self.world.size > 1:
            # Dropout differs between ranks, and depends on nothing that came before: a checkpoint holds one state.
            rng.seed_all(stream_key(self.seed, "rank", step, self.world.rank))
        return self.learner.step(batch, step)

    @torch.no_grad()
    def logprobs(
        self,
        prompt_tokens: np.ndarray,
        completion_tokens: np.ndarray,
        *,
        temperature: float = 1.0,
        adapter: bool = True,
    ) -> np.ndarray:
        if self._leads:
            self._asked((prompt_tokens, completion_tokens, temperature, adapter))
        self.policy.peft.eval()
        tokens = torch.from_numpy(np.concatenate((prompt_tokens, completion_tokens))).to(self.policy.device)
        with nullcontext() if adapter else self.policy.peft.disable_adapter(), self.policy.together.lockstep():
            hidden_TD = self.policy.hidden(tokens[None])[0, len(prompt_tokens) - 1 : -1]
        head = self.policy.head
        targets = tokens[len(prompt_tokens) :]
        logprob_T, _ = linear_logprob(hidden_TD, head.weight, targets, bias=head.bias, temperature=temperature)
        return logprob_T.float().cpu().numpy()

    def on_first(self, work: Callable[[], T]) -> T:
        """As `World.first`; `work` may ask for `logprobs`, and where the base is sharded, all ranks make its passes."""
        if not self.policy.is_sharded:
            return self.world.first(work)

        def lead() -> T:
            self._leads = True
            try:
                return work()
            finally:
                self._leads = False
                self._asked(None)

        if self.world.rank:
            while (asked := self._asked(None)) is not None:
                prompt, completion, temperature, adapter = asked
                self.logprobs(prompt, completion, temperature=temperature, adapter=adapter)
        return self.world.first(lead)

    def _asked(self, arguments: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """The arguments of the next `logprobs` on the rank that leads; None: there is none any more."""
        return self.world.first(lambda: arguments)

    def squeeze(self, rank: int) -> dict[str, float]:
        """Lower the adapter's rank in place; see `retrain.backend.ranks.squeeze`."""
        return ranks.squeeze(self.policy, self.learner.optimizer, rank)

    def save_adapter(self, folder: Path) -> None:
        (folder / ADAPTER_WEIGHTS).write_bytes(snapshot.adapter_bytes(self.policy, {"format": "pt"}))
        config: Any = copy.copy(self.policy.peft.peft_config["default"])
        config.inference_mode = True
        # A set has another order in every process, and a run's files are to be the same bit for bit.
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))

    def load_adapter(self, folder: Path) -> None:
        """Raises RetrainError when the adapter in `folder` is missing, damaged or made for another model or rank."""
        path = folder / ADAPTER_WEIGHTS
        if not path.is_file():
            raise RetrainError(f"no adapter in {folder}: there is no {ADAPTER_WEIGHTS}")
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise RetrainError(f"{path} is damaged: {error}") from error
        if ranks.has_patterns(folder):
            ranks.take_up(self.policy, ranks.read_config(folder))
        own = snapshot.adapter_state(self.policy)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise RetrainError(
                f"the adapter in {folder} does not fit this config: its layers or ranks differ. "
                "model.model, model.lora_rank and lora.target_modules must be those it was trained with"
            )
        set_peft_model_state_dict(self.policy.peft, state)

    def snapshot(self) -> bytes:
        """The adapter as it is now; see `retrain.backend.snapshot`."""
        return snapshot.take(self.policy)

    def put(self, taken: bytes) -> None:
        """Take up the adapter of a snapshot. Optimizer and random streams stay as they are."""
        snapshot.put(self.policy, taken)

    def save(self, folder: Path) -> None:
        self.save_adapter(folder)
        trainer_state.write(folder / trainer_state.TRAINER_STATE, self.learner.optimizer)

    def load(self, folder: Path) -> None:
        ranks.take_up(self.policy, ranks.read_config(folder))  # it may have been squeezed before the checkpoint
        self.load_adapter(folder)
        trainer_state.read(folder / trainer_state.TRAINER_STATE, self.learner.optimizer)

    def describe(self) -> dict[str, Any]:
        base = sum(p.numel() for _, p in self.policy.base_parameters())
        return {
            "parameters": base,
            "trainable_parameters": sum(p.numel() for p in self.learner.parameters),
            "device": str(self.policy.device),
            "dtype": str(self.policy.head.weight.dtype).removeprefix("torch."),
            "kernels": self.kernels,
            "shared_prompts": self.learner.share_prompts,
        }

    def base_digest(self) -> str:
        return base_digest(self.policy)

    def replica_digest(self) -> str:
        """SHA-256 over the adapter and its optimizer: the same on every rank."""
        digest = hashlib.sha256()
        for parameter in self.learner.parameters:
            moments = self.learner.optimizer.state[parameter].values()
            for tensor in (parameter, *(value for value in moments if isinstance(value, Tensor))):
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def figures(self) -> dict[str, float | None]:
        return {}

    def peak_memory_bytes(self) -> int:
        """On the rank that has taken most."""
        return max(self.world.gather(peak_memory_bytes(self.policy.device)))
