"""`provider = "verifiers"`: environments of the verifiers library, 0.3 (github.com/PrimeIntellect-ai/verifiers).

Dataset, turns, tools and rubric are the environment's. The model's turns are ours: `Player` stands where verifiers has
a client of an inference server, and asks the run's own engine, with the token ids of the conversation so far.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from retrain.environment import Outcome, Problem, Start, module_of
from retrain.environment.chat import Chat
from retrain.environment.player import Player, as_dict, player_class
from retrain.environment.waves import Episode, EpisodeFailed, Sample, Take, Waves
from retrain.types import ConfigError, Example, Score

if TYPE_CHECKING:
    from retrain.config import EnvironmentConfig

HUB = "https://hub.primeintellect.ai"

# Rewards that raised while the episode of this context was scored: verifiers itself turns them into 0.
_failures: ContextVar[list[str]] = ContextVar("failures")


class VerifiersEnvironment:
    """See `retrain.environment.Environment`."""

    def __init__(self, section: EnvironmentConfig, chat: Chat, *, context: int) -> None:
        self.chat, self.context = chat, context
        self.name = f'environment.id = "{section.id}"'
        with _own_signals(), _no_progress_bars():
            self.env = _load(section)
            self._tools = [as_dict(tool) for tool in self.env.tool_defs or ()]
            self.train: Sequence[Problem] = self._problems(self._train_rows())
            self.eval: Sequence[Problem] = self._problems(self.env.eval_dataset if self._has_eval() else ())
        if section.max_turns > 0 and hasattr(self.env, "max_turns"):
            own = self.env.max_turns
            self.env.max_turns = min(own, section.max_turns) if own > 0 else section.max_turns
        for rubric in _rubrics(self.env.rubric):
            rubric.funcs = [_watched(f) if w else f for f, w in zip(rubric.funcs, rubric.weights, strict=True)]
        self._waves = Waves(section.timeout_s)

    def play(self, groups: Sequence[Sequence[Start]], sample: Sample, *, max_tokens: int) -> list[list[Outcome]]:
        starts = [start for group in groups for start in group]
        players = [self._player(start, max_tokens) for start in starts]
        episodes = [self._episode(start, player) for start, player in zip(starts, players, strict=True)]
        results = iter(self._waves.play(episodes, sample))
        states = [[next(results) for _ in group] for group in groups]
        if self.env.requires_group_rollouts:
            states = [self._score_group(group) for group in states]
        own = iter(players)
        return [[Outcome(next(own).completion(), _score(state)) for state in group] for group in states]

    def close(self) -> None:
        self._waves.close()

    def _player(self, start: Start, max_tokens: int) -> Player:
        problem = start.problem
        opening = [as_dict(message) for message in problem.row["prompt"]]
        return player_class()(self.chat, problem.prompt_T, opening, self._tools, start.stream, max_tokens, self.context)

    def _episode(self, start: Start, player: Player) -> Episode:
        async def play(take: Take) -> Any:
            player.take = take
            state = await self.env.rollout(dict(start.problem.row), player, "retrain", {})
            if state.get("error") is not None:
                raise EpisodeFailed(_reason(state["error"]))
            if state.get("timed_out"):
                raise EpisodeFailed("it took longer than the environment allows")
            if not self.env.requires_group_rollouts:
                await self._score([state], self.env.rubric.score_rollout, state)
                await self.env.rubric.cleanup(state)
            return state

        return play

    def _score_group(self, group: list[Any]) -> list[Any]:
        """A rubric that compares the episodes of a group sees those that ended well."""
        played = [state for state in group if not isinstance(state, EpisodeFailed)]
        if not played:
            return group

        async def score() -> None:
            await self._score(played, self.env.rubric.score_group, played)
            for state in played:
                await self.env.rubric.cleanup(state)

        try:
            self._waves.call(score)
        except Exception as error:  # noqa: BLE001 - foreign code, which may fail in any way
            failure = EpisodeFailed(f"scoring the group: {type(error).__name__}: {error}")
            return [failure] * len(group)
        return group

    async def _score(self, states: Sequence[Any], score: Callable[[Any], Any], argument: Any) -> None:
        failures: list[str] = []
        _failures.set(failures)
        await score(argument)
        for state in states:
            state["reward_failures"] = failures

    def _train_rows(self) -> Any:
        try:
            rows = self.env.get_dataset()
        except ValueError:
            rows = ()
        if len(rows) == 0:
            raise ConfigError(f"{self.name}: it has no training set, it is for evaluation only; use another one")
        return rows

    def _has_eval(self) -> bool:
        self.env.build_eval_dataset()
        return self.env.eval_dataset is not None

    def _problems(self, rows: Any) -> list[Problem]:
        return [self._problem(number, dict(row)) for number, row in enumerate(rows)]

    def _problem(self, number: int, row: dict[str, Any]) -> Problem:
        prompt = row.get("prompt")
        if not isinstance(prompt, list):
            raise ConfigError(
                f"{self.name}: row {number} has no list of messages as its prompt; only chats can be trained"
            )
        ids = self.chat.opening([as_dict(message) for message in prompt], self._tools)
        try:
            text = "\n\n".join(str(message["content"]) for message in prompt if message["role"] != "system")
            example = Example(text, str(row.get("answer", "")))
        except ValueError as error:
            raise ConfigError(f"{self.name}: row {number}: {error}") from None
        return Problem(example, np.array(ids, dtype=np.int64), row)


def _score(state: Any) -> Score:
    if isinstance(state, EpisodeFailed):
        return Score(None, str(state))
    if state["reward_failures"]:
        return Score(None, "; ".join(state["reward_failures"]))
    reward = state["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        return Score(None, f"the reward is {reward!r}, no finite number")
    return Score(float(reward))


def _reason(error: BaseException) -> str:
    """Of a chain of errors the first cause: verifiers wraps what an environment raises in errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _load(section: EnvironmentConfig) -> Any:
    place = f'environment.id = "{section.id}"'
    if importlib.util.find_spec("verifiers") is None:
        raise ConfigError(f'{place}: needs the verifiers library: pip install "retrain[verifiers]"')
    verifiers = importlib.import_module("verifiers")
    try:
        load = verifiers.load_environment
    except AttributeError:
        raise ConfigError(
            f"{place}: verifiers {verifiers.__version__} has no load_environment, which went with 0.4: pip install "
            '"retrain[verifiers]"'
        ) from None
    module = module_of(section.id)
    if importlib.util.find_spec(module) is None:
        if not section.auto_install:
            raise ConfigError(
                f"{place}: no module {module} is installed; install it (prime env install {section.id}), or set "
                "environment.auto_install = true"
            )
        _install(section.id, module, place)
    try:
        return load(section.id.split("@")[0], **section.args)
    except Exception as error:  # foreign code, which may fail in any way
        raise ConfigError(
            f"{place}: cannot be loaded with environment.args = {section.args}: {_reason(error)}"
        ) from error


def _install(name: str, module: str, place: str) -> None:
    """From the Prime hub, which keeps a package index for each owner.

    The environment comes from that index alone: were PyPI asked as well, anybody could put a higher version of the same
    name there. What it requires comes from PyPI alone.
    """
    owner, _, package = name.rpartition("/")
    wanted = package.replace("@", "==")
    if owner:
        _pip(["--no-deps", "--index-url", f"{HUB}/{owner}/simple/", wanted], wanted, place)
        requires = importlib.metadata.requires(package.partition("@")[0])
        if requires:
            _pip(requires, f"what {wanted} requires", place)
    else:
        _pip([wanted], wanted, place)
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{place}: {wanted} brings no module {module}")


def _pip(arguments: Sequence[str], what: str, place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *arguments], capture_output=True, text=True
    )
    importlib.invalidate_caches()
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip does not say why"])[-1]
        raise ConfigError(f"{place}: {what} cannot be installed: {reason}")


def _rubrics(rubric: Any) -> Iterator[Any]:
    """Those that hold reward functions: a group of rubrics has none of its own."""
    parts = getattr(rubric, "rubrics", None)
    if parts is None:
        yield rubric
    else:
        for part in parts:
            yield from _rubrics(part)


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reward function, its failures noted: a reward that could not be computed is not a reward of 0."""

    @functools.wraps(function)
    async def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            name = getattr(function, "__name__", repr(function))
            _failures.get().append(f"reward {name}: {type(error).__name__}: {error}")
            raise

    return watched


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Environments map over their rows; what that takes is of no interest."""
    datasets = importlib.import_module("datasets") if importlib.util.find_spec("datasets") else None
    if datasets is None or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _own_signals() -> Iterator[None]:
    """verifiers' environments install handlers of their own, which would end a run without its checkpoint."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
