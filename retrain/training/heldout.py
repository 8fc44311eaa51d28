"""Evaluation on held-out examples: within a run, and of an adapter in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrain import data, reward
from retrain.backend import open_backend
from retrain.inference import Engine, Serving, open_engine
from retrain.training.evaluate import Evaluation, evaluate
from retrain.training.prompts import encode_prompts
from retrain.types import ConfigError, Example

if TYPE_CHECKING:
    from retrain.config import Config

NOTHING_HELD_OUT = "no example is held out to evaluate on: set data.eval_fraction (such as 0.1), or a larger one"


def evaluate_adapter(config: Config, adapter: Path | None, *, say: Callable[[str], None]) -> Evaluation:
    """`[eval]` on the held-out examples of `config`, with the adapter in a folder or (None) the base model alone.

    Raises ConfigError where nothing is held out, RetrainError where the adapter is not for this model.
    """
    seed = max(config.training.seed, 0)
    dataset = data.load(config.data)
    if not dataset.eval:
        raise ConfigError(NOTHING_HELD_OUT)
    backend = open_backend(_shaped_like(config, adapter), seed=seed, say=say)
    if adapter:
        backend.load_adapter(adapter)
    examples, prompt_tokens = encode_prompts(
        dataset.eval,
        backend.tokenizer,
        context=backend.context,
        max_tokens=config.training.max_tokens,
        max_prompt_tokens=config.training.max_prompt_tokens,
        say=say,
    )
    engine = open_engine(config.inference, backend, Serving.of(config, say))
    scorer = reward.open_scorer(config.reward.type)
    try:
        if adapter:
            engine.publish(0)
        return evaluate_held_out(config, engine, scorer, examples, prompt_tokens, seed=seed)
    finally:
        scorer.close()
        engine.close()


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


def evaluate_held_out(
    config: Config,
    engine: Engine,
    scorer: reward.Scorer,
    examples: Sequence[Example],
    prompt_tokens: Sequence[np.ndarray],
    *,
    seed: int,
) -> Evaluation:
    """`[eval]` on at most `eval.examples` held-out examples, chosen by content: always the same ones."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].id)[: config.eval.examples]
    return evaluate(
        engine,
        scorer,
        [examples[i] for i in order],
        [prompt_tokens[i] for i in order],
        samples=config.eval.samples,
        temperature=config.eval.temperature,
        max_tokens=config.training.max_tokens,
        seed=seed,
        prompts_at_once=max(1, config.training.batch_size * config.training.group_size // config.eval.samples),
    )
