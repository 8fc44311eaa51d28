"""Where prompts come from (`[data]`), and in which order a run meets them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrain.data import arithmetic, files
from retrain.plugin import load_callable
from retrain.streams import generator, stream_key
from retrain.types import ConfigError, Example

if TYPE_CHECKING:
    from retrain.config import DataConfig


@dataclass(frozen=True)
class Dataset:
    """Disjoint examples to train on and to evaluate on, each in source order."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]


def load(section: DataConfig, *, max_examples: int = 0) -> Dataset:
    """Load `[data] source`, hold out `eval_fraction` of it, and keep `max_examples` (0 = all) for training.

    Raises ConfigError for a source that is missing, malformed or empty.
    """
    examples = _read(section)
    held_out = [is_held_out(example, section.eval_fraction) for example in examples]
    train = tuple(e for e, out in zip(examples, held_out, strict=True) if not out)
    evaluation = tuple(e for e, out in zip(examples, held_out, strict=True) if out)
    if not train:
        raise ConfigError(
            f'data.source = "{section.source}" has no example to train on ({len(examples)} in all, '
            f"{len(evaluation)} held out by data.eval_fraction = {section.eval_fraction})"
        )
    return Dataset(train[:max_examples] if max_examples else train, evaluation)


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether the example belongs to the evaluation split: decided by its content alone, so it never moves."""
    return int(example.id, 16) < fraction * 2**64


@functools.lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(stream_key(seed, "data", epoch)).permutation(count)


def position(ordinal: int, count: int, *, seed: int, shuffle: bool) -> int:
    """Index of the example that is the run's prompt number `ordinal`: a pure function of (seed, epoch)."""
    epoch, offset = divmod(ordinal, count)
    return int(_epoch_order(count, seed, epoch)[offset]) if shuffle else offset


def _read(section: DataConfig) -> list[Example]:
    name, _, variant = section.source.partition(":")
    if name == "arithmetic":
        return arithmetic.load(variant)
    if section.source.endswith(".jsonl"):
        return files.read_jsonl(
            Path(section.source), prompt_field=section.prompt_field, reference_field=section.reference_field
        )
    return _from_callable(section.source)


def _from_callable(path: str) -> list[Example]:
    """`pkg.mod.fn` takes no argument and returns an iterable of examples: Example objects or (prompt, reference)."""
    rows = load_callable(path, what="data.source", parameters=())()
    if not isinstance(rows, Iterable):
        raise ConfigError(f'data.source = "{path}" returned {type(rows).__name__}; it must return an iterable')
    examples = []
    for number, row in enumerate(rows):
        if isinstance(row, Example):
            examples.append(row)
        elif isinstance(row, tuple) and len(row) == 2 and all(isinstance(part, str) for part in row):
            examples.append(Example(*row))
        else:
            raise ConfigError(
                f'data.source = "{path}": item {number} is {row!r:.80}; '
                "it must be a retrain.types.Example or a (prompt, reference) pair of strings"
            )
    return examples
