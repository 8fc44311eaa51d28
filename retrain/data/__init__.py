"""Where prompts come from (`[data]`), and in which order a run meets them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrain.config.fields import source_kind
from retrain.data import arithmetic, files, gym, hub, problem_sets
from retrain.data.records import Recipe, check_ids, read_examples
from retrain.plugin import load_callable
from retrain.streams import generator, stream_key
from retrain.types import ConfigError, Example

if TYPE_CHECKING:
    from retrain.config import DataConfig


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and to evaluate on, each in source order; no prompt stands in both.

    train: may hold an example several times, as its source does. eval: each example once.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]


def _unheard(line: str) -> None:
    """Where nobody listens."""


def load(section: DataConfig, *, max_examples: int = 0, say: Callable[[str], None] = _unheard) -> Dataset:
    """Load `[data] source`, hold out `eval_fraction` of it, and keep `max_examples` (0 = all) for training.

    say: told in one line each what was left out, and which references contradict each other.
    Raises ConfigError for a source that is missing, malformed or empty.
    """
    examples = _read(section, say)
    if not examples:
        raise ConfigError(f'data.source = "{section.source}" is empty: there is no example to train on')
    train = [example for example in examples if not is_held_out(example, section.eval_fraction)]
    if not train:
        raise ConfigError(
            f'data.source = "{section.source}" leaves no example to train on: data.eval_fraction = '
            f"{section.eval_fraction} holds out all {len(examples)}. Lower it, or add examples"
        )
    # The noise of an evaluation is keyed by the example: a second copy would be the same measurement once more.
    held_out = dict.fromkeys(example for example in examples if is_held_out(example, section.eval_fraction))
    return Dataset(tuple(train[:max_examples] if max_examples else train), tuple(held_out))


def is_on_hub(source: str) -> bool:
    """Whether a `data.source` is fetched from the Hugging Face hub."""
    return source_kind(source) == "hub" or source in problem_sets.SETS


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether the example belongs to the evaluation split.

    Decided by its prompt alone: it never moves when data is added or a reference corrected, a larger fraction only adds
    to the split, and one question cannot stand on both sides.
    """
    return stream_key(0, "held out", example.prompt) < fraction * 2**64


@functools.lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(stream_key(seed, "data", epoch)).permutation(count)


def position(ordinal: int, count: int, *, seed: int, shuffle: bool) -> int:
    """Index, in 0..count-1, of the example that is the run's prompt number `ordinal`, counted from 0.

    Every epoch of `count` prompts meets each example once, in an order that is a pure function of (seed, epoch), or in
    source order without `shuffle`.
    """
    epoch, offset = divmod(ordinal, count)
    return int(_epoch_order(count, seed, epoch)[offset]) if shuffle else offset


def _read(section: DataConfig, say: Callable[[str], None]) -> list[Example]:
    source, kind = section.source, source_kind(section.source)
    name, _, variant = source.partition(":")
    recipe = Recipe(section.prompt_field, section.reference_field, section.prompt_template)
    if kind == "file":
        rows = files.read_rows(Path(source))
        check_ids(rows)
        return read_examples(rows, recipe, say=say)
    if kind == "hub":
        return read_examples(hub.read_rows(source, name, variant or None, section.split), recipe, say=say)
    if kind == "reasoning_gym":
        return gym.load(source, say=say)
    if name in problem_sets.SETS:
        recipe = problem_sets.recipe(name, section.prompt_template)
        return read_examples(problem_sets.read_rows(source, section.split), recipe, say=say)
    if name == "arithmetic":
        return arithmetic.load(variant)
    return _from_callable(source)


def _from_callable(path: str) -> list[Example]:
    """`pkg.mod.fn` takes no argument and returns an iterable of examples: Example objects or (prompt, reference)."""
    function = load_callable(path, what="data.source", parameters=())
    place = f'data.source = "{path}"'
    try:
        returned = function()
        rows = list(returned) if isinstance(returned, Iterable) else None
    except Exception as error:  # foreign code, which may fail in any way
        raise ConfigError(f"{place}: it raised {type(error).__name__}: {error}") from error
    if rows is None:
        raise ConfigError(f"{place}: it returned {type(returned).__name__}; it must return an iterable of examples")
    return [_as_example(row, f"{place}: item {number}") for number, row in enumerate(rows)]


def _as_example(row: object, place: str) -> Example:
    if isinstance(row, Example):
        return row
    if not isinstance(row, tuple) or len(row) != 2:
        raise ConfigError(
            f"{place} is {row!r:.80}; it must be a retrain.types.Example or a (prompt, reference) pair of strings"
        )
    try:
        return Example(*row)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
