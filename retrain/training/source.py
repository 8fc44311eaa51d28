"""Who asks, who answers and who judges in a run: opened from the config, and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrain import data, reward
from retrain.backend import Backend
from retrain.data import Dataset
from retrain.distributed import ALONE, World
from retrain.environment import open_environment
from retrain.inference import Engine, Serving, open_engine
from retrain.training.prompts import admit, encode_prompts
from retrain.training.rollouts import Answers, Episodes, Rollouts
from retrain.training.spread import EngineOfFirst, FirstAlone, Spread
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config

NOTHING_HELD_OUT = "no example is held out to evaluate on: set data.eval_fraction (such as 0.1), or a larger one"


@dataclass(frozen=True)
class Source:
    """train, held_out: what is asked in training and in evaluation; both sample from `engine`."""

    engine: Engine
    train: Rollouts
    held_out: Rollouts


def load_dataset(config: Config, *, evaluates: bool, say: Callable[[str], None]) -> Dataset | None:
    """`[data]`, before the model is loaded; None with an environment, which has its own.

    Raises ConfigError, too where an evaluation has nothing to ask.
    """
    if config.environment.provider:
        return None
    dataset = data.load(config.data, max_examples=config.training.max_examples, say=say)
    if evaluates and not dataset.eval:
        raise ConfigError(NOTHING_HELD_OUT)
    return dataset


def open_source(
    config: Config,
    dataset: Dataset | None,
    backend: Backend,
    *,
    evaluates: bool,
    say: Callable[[str], None],
    opened: ExitStack,
    world: World = ALONE,
) -> Source:
    """evaluates: whether held-out examples will be asked. opened: closes what is opened here. Raises ConfigError.

    world: the ranks that sample and judge together.
    """
    own = _open_own(config, dataset, backend, evaluates=evaluates, say=say, opened=opened, world=world)
    if world.size == 1:
        return own
    # Of its own: what samples may be another thread than what trains.
    sampling = world.group()
    if isinstance(own.engine, EngineOfFirst):
        return Source(own.engine, FirstAlone(own.train, sampling), FirstAlone(own.held_out, sampling))
    lockstep = config.backend.sharding == "fsdp"
    return Source(own.engine, *(Spread(rollouts, sampling, lockstep) for rollouts in (own.train, own.held_out)))


def _open_own(
    config: Config,
    dataset: Dataset | None,
    backend: Backend,
    *,
    evaluates: bool,
    say: Callable[[str], None],
    opened: ExitStack,
    world: World,
) -> Source:
    """What samples and judges in this process."""
    limits = {
        "context": backend.context,
        "max_tokens": config.training.max_tokens,
        "max_prompt_tokens": config.training.max_prompt_tokens,
    }
    if dataset is not None:
        train = encode_prompts(dataset.train, backend.tokenizer, **limits, say=say)
        held_out = encode_prompts(dataset.eval if evaluates else (), backend.tokenizer, **limits, say=say)
        engine = _engine(config, backend, say, opened, world)
        scorer = reward.open_rewards(config.reward, config.data.source)
        opened.callback(scorer.close)
        answers = [Answers(*prompts, engine, scorer, config.training.max_tokens) for prompts in (train, held_out)]
        return Source(engine, *answers)
    environment = open_environment(config, backend.tokenizer, eos_ids=backend.eos_ids, context=backend.context)
    opened.callback(environment.close)
    if evaluates and not environment.eval:
        raise ConfigError(f'environment.id = "{config.environment.id}": it holds no example out to evaluate on')
    problems = [
        admit(list(found), lambda problem: problem.prompt_T, lambda problem: problem.example.prompt, **limits, say=say)
        for found in (environment.train, environment.eval if evaluates else ())
    ]
    if config.training.max_examples:
        problems[0] = problems[0][: config.training.max_examples]
    engine = _engine(config, backend, say, opened, world)
    return Source(engine, *(Episodes(found, environment, engine, config.training.max_tokens) for found in problems))


def _engine(config: Config, backend: Backend, say: Callable[[str], None], opened: ExitStack, world: World) -> Engine:
    """An engine in this process, or the one that talks to servers, which only the first rank has."""
    from retrain.backend.local import LocalBackend

    def open_own() -> Engine:
        return open_engine(config.inference, backend, Serving.of(config, say))

    if world.size > 1 and config.inference.engine != "pytorch":
        assert isinstance(backend, LocalBackend)  # `check_ranks` sees to it
        engine = EngineOfFirst(backend.on_first, open_own)
    else:
        engine = open_own()
    opened.callback(engine.close)
    return engine
