"""The frozen base, its tokenizer and the LoRA adapter on it."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from retrain.assets import resolve_model
from retrain.backend.devices import resolve_dtype, settle_threads
from retrain.backend.sharding import shard, whole
from retrain.config.suggest import nearest
from retrain.distributed import ALONE, World
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import LoraConfig, ModelConfig, TrainingConfig


@dataclass(frozen=True)
class Policy:
    """A causal LM with a LoRA adapter: the base is frozen and never written, the adapter is what trains.

    lm: the transformers model with LoRA layers inside. peft: the same, as PEFT sees it.
    eos_ids: token ids that end a completion. context: longest sequence the model can take, in tokens.
    together: the ranks that hold the base in parts, and so make every pass at the same time; alone, it is whole.
    """

    peft: PeftModel
    lm: Any
    tokenizer: Any
    device: torch.device
    eos_ids: tuple[int, ...]
    context: int
    together: World = ALONE

    @property
    def is_sharded(self) -> bool:
        return self.together.size > 1

    def hidden(self, tokens_RS: Tensor, positions_RS: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Final hidden states [R, S, D], after the last norm; `mask` is boolean [R, 1, S, S], None is causal."""
        outputs = self.lm.base_model(
            input_ids=tokens_RS, position_ids=positions_RS, attention_mask=mask, use_cache=False
        )
        return outputs.last_hidden_state

    @property
    def head(self) -> nn.Linear:
        return self.lm.get_output_embeddings()

    def base_parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.peft.named_parameters() if "lora_" not in name]

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.peft.parameters() if p.requires_grad]


def base_digest(policy: Policy) -> str:
    """SHA-256 over every tensor of the base: equal before and after a run, or the run is not what it says.

    Where it is sharded, all ranks ask for it together.
    """
    digest = hashlib.sha256()
    for name, parameter in policy.base_parameters():
        digest.update(name.encode())
        digest.update(whole(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_policy(
    model: ModelConfig,
    lora: LoraConfig,
    training: TrainingConfig,
    device: torch.device,
    *,
    lora_seed: int,
    say: Callable[[str], None],
    processes: int = 1,
    sharded_over: World | None = None,
) -> Policy:
    """Load the base, freeze it and attach a fresh adapter drawn from `lora_seed` (on the CPU: same on every device).

    processes: how many of this run compute on the device at a time. sharded_over: ranks that each are
    to hold a share of the base's blocks, where that is asked for.
    Raises ConfigError for a model, tokenizer or LoRA target that cannot be used.
    """
    dtype = resolve_dtype(training.dtype, device)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    say(f"loading {model.model} as {str(dtype).removeprefix('torch.')} on {device}")
    base, tokenizer = _load_base(model, dtype)
    settle_threads(device, base.num_parameters(), processes)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    eos_ids = eos_ids_of(base.config, base.generation_config, tokenizer, model.model)
    with warnings.catch_warnings():
        # transformers is renaming these, PEFT has not followed, and only the old names work in every version we take.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        peft = _attach(base, model, lora, lora_seed)
        if training.gradient_checkpointing:
            peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    together = sharded_over or ALONE
    if together.size > 1:
        # Before it is on the device, where it may not fit as a whole.
        shard(peft.get_base_model(), device, together, model.model)
        say(f"the base model is sharded over {together.size} processes")
    elif sharded_over is not None:
        say('backend.sharding = "fsdp": no effect with one process (docs/data-parallel.md)')
    peft.to(device)
    peft.eval()
    context = context_of(base.config, tokenizer)
    policy = Policy(peft, peft.get_base_model(), tokenizer, device, eos_ids, context, together)
    check_head(policy, model.model)
    return policy


def _load_base(model: ModelConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    name = model.model
    path = resolve_model(name)
    looks_local = name.startswith((".", "/", "~"))
    if looks_local:
        path = str(Path(path).expanduser())
        if not Path(path, "config.json").is_file():
            raise ConfigError(f'model.model = "{name}": no model in that folder (there is no config.json)')
    try:
        # Said each time: where it is not, transformers asks on the terminal.
        code = {"trust_remote_code": model.trust_remote_code}
        config = AutoConfig.from_pretrained(path, **code)
        _disable_dropout(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            # The other format, pytorch_model.bin, is a pickle.
            use_safetensors=True,
            **code,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise cannot_load(name, error) from error
    base, report = loaded
    if report["missing_keys"]:
        raise ConfigError(
            f'model.model = "{name}": its files hold no weights for {", ".join(sorted(report["missing_keys"])[:3])}, '
            "which would be drawn at random; use a complete causal language model"
        )
    return base, tokenizer


def cannot_load(name: str, error: Exception) -> ConfigError:
    """What a failure of transformers to load the model `name` means for the user."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return ConfigError(
            f'model.model = "{name}": comes with Python code of its own, which would run with all of your rights. '
            "Read it, and set model.trust_remote_code = true where you trust it, or use a model without"
        )
    if "safetensors" in reason and ("no file named" in reason or "does not appear to have" in reason):
        return ConfigError(
            f'model.model = "{name}": has no safetensors weights (model.safetensors). Other formats are pickles, '
            "which can run code when they are read, and are never opened: convert them elsewhere"
        )
    return ConfigError(
        f'model.model = "{name}" cannot be loaded as a causal language model: {reason:.300}. '
        'Write a folder, a hub id that is cached or can be reached, or "builtin:tiny"'
    )


def _disable_dropout(config: Any) -> None:
    """Dropout in the base would make the trainer see another policy than the one that sampled."""
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        # attention_dropout, resid_pdrop, layerdrop: all hold the word.
        if isinstance(value, float) and "drop" in key:
            setattr(text, key, 0.0)


def context_of(config: Any, tokenizer: Any) -> int:
    """The longest sequence, in tokens."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length)


def eos_ids_of(config: Any, generation_config: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    """Ids that end a completion, by a model's configs and its tokenizer. Raises ConfigError where none does."""
    configured = generation_config.eos_token_id if generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    ids.append(tokenizer.eos_token_id)
    # Architectures come with default ids that a small vocabulary does not reach.
    ids = {i for i in ids if i is not None and 0 <= i < config.get_text_config().vocab_size}
    if not ids:
        raise ConfigError(
            f'model.model = "{name}": neither its tokenizer nor its generation_config.json names an end-of-sequence '
            "token, so no completion could ever end; set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(ids))


def _attach(base: Any, model: ModelConfig, lora: LoraConfig, seed: int) -> PeftModel:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if not isinstance(targets, str):
        _check_targets(base, targets)
    adapter = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_rank,
        lora_alpha=lora.alpha_for(model.lora_rank),
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        base_model_name_or_path=resolve_model(model.model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(base, adapter)
    assert isinstance(peft, PeftModel)
    return peft


def _check_targets(base: Any, targets: list[str]) -> None:
    head = base.get_output_embeddings()
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    leaves = sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head})
    for target in targets:
        matched = [module for name, module in linear.items() if name == target or name.endswith("." + target)]
        if any(module is head for module in matched):
            raise ConfigError(f'lora.target_modules: "{target}" is the output head, which stays frozen; leave it out')
        if not matched:
            near = nearest(target, leaves)
            hint = f'did you mean "{near}"?' if near else f"the model has {', '.join(leaves)}"
            raise ConfigError(f'lora.target_modules: "{target}" matches no linear layer of the model; {hint}')


@torch.no_grad()
def check_head(policy: Policy, name: str) -> None:
    """The learner takes log-probs from hidden states and the head's weight: prove that this is the model's output.

    A model that scales or caps its logits would otherwise train on other probabilities than it samples with. The head's
    output is made large on the way, because a cap does not show on small logits.
    """
    seen: dict[str, Tensor] = {}

    def amplify(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["hidden"], seen["logits"] = arguments[0], output * (100 / output.abs().max())
        return seen["logits"]

    probe = torch.arange(8, device=policy.device)[None] % policy.lm.config.get_text_config().vocab_size
    handle = policy.head.register_forward_hook(amplify)
    try:
        logits = policy.lm(input_ids=probe, use_cache=False).logits
    finally:
        handle.remove()
    if not (seen and _close(seen["logits"], logits) and _close(seen["hidden"], policy.hidden(probe))):
        raise ConfigError(
            f'model.model = "{name}": its logits are not a plain linear head on its last hidden state '
            "(scaled or capped logits); this architecture is not supported"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= 1e-2 * b.float().norm())
