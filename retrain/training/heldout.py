"""Evaluation on held-out examples: within a run, and of an adapter in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.backend import open_backend
from retrain.environment import Outcome
from retrain.training.evaluate import Evaluation, answered, evaluate
from retrain.training.rollouts import Rollouts
from retrain.training.source import load_dataset, open_source

if TYPE_CHECKING:
    from retrain.config import Config


def evaluate_adapter(config: Config, adapter: Path | None, *, say: Callable[[str], None]) -> Evaluation:
    """`[eval]` on the held-out examples of `config`, with the adapter in a folder or (None) the base model alone.

    Raises ConfigError where nothing is held out, RetrainError where the adapter is not for this model.
    """
    with ExitStack() as opened:
        return evaluate_held_out(config, _open_held_out(config, adapter, say, opened), seed=_seed(config))


def answer_with_adapter(config: Config, adapter: Path, *, say: Callable[[str], None]) -> list[list[Outcome]]:
    """What `evaluate_adapter` judges: the completions of each held-out example, in an order of the examples' own."""
    with ExitStack() as opened:
        rollouts = _open_held_out(config, adapter, say, opened)
        return list(answered(rollouts, _places(config, rollouts), **_sampling(config), seed=_seed(config)))


def _seed(config: Config) -> int:
    return max(config.training.seed, 0)


def _open_held_out(config: Config, adapter: Path | None, say: Callable[[str], None], opened: ExitStack) -> Rollouts:
    """Rollouts on the held-out examples; `opened` closes what is opened here."""
    dataset = load_dataset(config, evaluates=True, say=say)
    backend = open_backend(_shaped_like(config, adapter), seed=_seed(config), say=say)
    if adapter:
        backend.load_adapter(adapter)
    source = open_source(config, dataset, backend, evaluates=True, say=say, opened=opened)
    if adapter:
        source.engine.publish(0)
    return source.held_out


def _shaped_like(config: Config, adapter: Path | None) -> Config:
    """The config with the LoRA shape of the adapter: one of another rank can be evaluated as well."""
    if adapter is None:
        return config
    shape = json.loads((adapter / "adapter_config.json").read_bytes())
    targets = shape["target_modules"]
    lora = {
        "alpha": shape["lora_alpha"],
        "use_rslora": shape.get("use_rslora", False),
        "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets)),
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"lora_rank": shape["r"]}),
            "lora": config.lora.model_copy(update=lora),
        }
    )


def evaluate_held_out(config: Config, rollouts: Rollouts, *, seed: int) -> Evaluation:
    """`[eval]` on at most `eval.examples` held-out examples, chosen by content: always the same ones."""
    return evaluate(rollouts, _places(config, rollouts), **_sampling(config), seed=seed)


def _places(config: Config, rollouts: Rollouts) -> list[int]:
    examples = rollouts.examples
    return sorted(range(len(examples)), key=lambda i: examples[i].id)[: config.eval.examples]


def _sampling(config: Config) -> dict[str, Any]:
    return {
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
        "prompts_at_once": max(1, config.training.batch_size * config.training.group_size // config.eval.samples),
    }
