"""Command-line flags, generated from the schema: one for every key, and the spellings that stand for the same key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from retrain.cli.commands import COMMANDS, EVERYWHERE, Command, Option, command
from retrain.config import DEFAULT_PATH, KEYS, Config, Key, load_config
from retrain.config.suggest import did_you_mean, nearest
from retrain.types import ConfigError

# Promised under these names although the rule would give others: the first is a key of two sections.
PROMISED = {"training.max_steps": "--max-steps", "resume.from": "--resume"}

_COUNT = Counter(key.name for key in KEYS.values())


@dataclass(frozen=True)
class Parsed:
    """A command line taken apart. overrides: {"section.key": value}; options: the command's own flags by name,
    None or False where not given."""

    positionals: tuple[str, ...]
    overrides: dict[str, Any]
    options: dict[str, Any]

    @property
    def config_path(self) -> str | None:
        return self.positionals[0] if self.positionals else None

    def load(self) -> Config:
        """The config it names (./retrain.toml where it names none), with its overrides."""
        return load_config(self.config_path or DEFAULT_PATH, self.overrides)


def main_flag(key: Key) -> str:
    """The flag under which a key is documented."""
    if key.path in PROMISED:
        return PROMISED[key.path]
    owns_bare_name = key.name == key.section or _COUNT[key.name] == 1
    return f"--{_kebab(key.name)}" if owns_bare_name else f"--{_kebab(key.section)}-{_kebab(key.name)}"


def spellings(key: Key) -> tuple[str, ...]:
    """Every flag that sets a key, the documented one first."""
    bare = (f"--{_kebab(key.name)}",) if _COUNT[key.name] == 1 else ()
    qualified = f"--{_kebab(key.section)}-{_kebab(key.name)}"
    dotted = (f"--{key.path}", f"--{_kebab(key.path)}")
    return tuple(dict.fromkeys((main_flag(key), *bare, qualified, *dotted)))


def _kebab(name: str) -> str:
    return name.replace("_", "-")


FLAGS: dict[str, Key] = {flag: key for key in KEYS.values() for flag in spellings(key)}
NEGATIVE: dict[str, Key] = {f"--no-{flag[2:]}": key for flag, key in FLAGS.items() if key.type == "bool"}


def parse(argv: Sequence[str], name: str = "train") -> Parsed:
    """Take the arguments of a command apart (its own name not among them).

    Raises ConfigError for an unknown flag (with the nearest), a missing or malformed value, a flag given twice, or
    too many arguments.
    """
    entry = command(name)
    options: dict[str, Any] = {option.name: None if option.metavar else False for option in entry.options}
    overrides: dict[str, Any] = {}
    positionals: list[str] = []
    given: dict[str, str] = {}
    words = iter(_Words(argv))
    for word in words:
        if word == "--":
            positionals.extend(words)
        elif not _is_flag(word):
            positionals.append(word)
        else:
            flag, equals, text = word.partition("=")
            target, value = _setting(flag, text if equals else None, words, entry)
            if target in given:
                twice = "" if given[target] == flag else f" (first as {given[target]})"
                raise ConfigError(f"{flag}: given twice{twice}; give it once")
            given[target] = flag
            (overrides if target in KEYS else options)[target] = value
    _check_positionals(positionals, entry)
    return Parsed(tuple(positionals), overrides, options)


class _Words:
    """The arguments one by one, with a look at the next."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv, self._next = list(argv), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._next == len(self._argv):
            raise StopIteration
        self._next += 1
        return self._argv[self._next - 1]

    def take_value(self, flag: str, expected: str) -> str:
        word = next(self, None)
        if word is None or word.startswith("--"):
            raise ConfigError(f"{flag}: needs a value: {expected}")
        return word


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1
