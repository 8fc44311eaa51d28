"""Command-line flags, generated from the schema: one for every key, and the spellings that stand for the same key."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Sequence
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
    words = deque(argv)
    while words:
        word = words.popleft()
        if word == "--":
            positionals.extend(words)
            break
        if not _is_flag(word):
            positionals.append(word)
            continue
        flag, equals, text = word.partition("=")
        target, value = _setting(flag, text if equals else None, words, entry)
        if target in given:
            twice = "" if given[target] == flag else f" (first as {given[target]})"
            raise ConfigError(f"{flag}: given twice{twice}; give it once")
        given[target] = flag
        (overrides if target in KEYS else options)[target] = value
    _check_positionals(positionals, entry)
    return Parsed(tuple(positionals), overrides, options)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1


def _setting(flag: str, text: str | None, words: deque[str], entry: Command) -> tuple[str, Any]:
    """What a flag sets (a key's path, or an option's name) and to which value; `words` are the arguments after it."""
    option = next((option for option in entry.options if option.flag == flag), None)
    if option is not None:
        return option.name, _option_value(option, text, words)
    if entry.config_flags and flag in NEGATIVE:
        if text is not None:
            raise ConfigError(f"{flag}: takes no value")
        return NEGATIVE[flag].path, False
    if not entry.config_flags or flag not in FLAGS:
        raise ConfigError(f"{flag}: unknown flag{_hint(flag, entry)}")
    key = FLAGS[flag]
    if key.type == "bool" and text is None:
        return key.path, True
    value = _take_value(flag, placeholder(key), words) if text is None else text
    return key.path, _convert(flag, key, value)


def _option_value(option: Option, text: str | None, words: deque[str]) -> Any:
    if option.metavar:
        return _take_value(option.flag, option.metavar, words) if text is None else text
    if text is not None:
        raise ConfigError(f"{option.flag}: takes no value")
    return True


def _take_value(flag: str, expected: str, words: deque[str]) -> str:
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{flag}: needs a value, {expected}")
    return words.popleft()


def placeholder(key: Key) -> str:
    """What the value of a key's flag looks like, for help and messages; empty for a switch."""
    if key.choices:
        return "|".join(choice or '""' for choice in key.choices)
    if key.type == "bool":
        return ""
    names = {
        "int": "INT",
        "float": "NUMBER",
        "str": "TEXT",
        "list[int]": "INT,INT,...",
        "str / list[str]": "NAME,NAME,...",
    }
    return names.get(key.type, "JSON")


def _convert(flag: str, key: Key, text: str) -> Any:
    """The value that a flag's text stands for, in the type that TOML would give; ranges are the schema's matter."""
    try:
        match key.type:
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "list[int]":
                return [int(part) for part in text.split(",")] if text else []
            case "list[table]":
                return json.loads(text)
            case "str / list[str]" if text != key.default:
                return [part.strip() for part in text.split(",")]
    except (ValueError, KeyError):
        expected = {"bool": "true or false", "int": "an integer", "float": "a number", "list[table]": "JSON"}
        raise ConfigError(f"{flag} {text}: must be {expected.get(key.type, 'integers, as in 4,8')}") from None
    return text


def _hint(flag: str, entry: Command) -> str:
    """The nearest flag of the command; for a name that several sections share, all of its flags."""
    sharing = [main_flag(key) for key in KEYS.values() if f"--{_kebab(key.name)}" == flag]
    if sharing and entry.config_flags:
        return f"; write {' or '.join(sharing)}"
    own = [option.flag for option in (*entry.options, *EVERYWHERE)]
    known = [*own, *FLAGS, *NEGATIVE] if entry.config_flags else own
    return did_you_mean(flag, known, "{}") or f"; see `{entry.spoken} --help`"


def _check_positionals(positionals: list[str], entry: Command) -> None:
    if len(positionals) <= entry.positionals:
        return
    near = nearest(positionals[0], COMMANDS) if entry.name not in COMMANDS else None
    if near is not None:
        raise ConfigError(f'"{positionals[0]}": unknown command; did you mean `retrain {near}`?')
    extra = positionals[entry.positionals]
    raise ConfigError(f'"{extra}": one argument too many; the usage is: {entry.spoken} {entry.usage}')
