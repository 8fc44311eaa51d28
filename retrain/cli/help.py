"""The text of `--help`, made from the table of commands and the schema."""

from __future__ import annotations

import textwrap

from retrain.cli.commands import COMMANDS, EVERYWHERE, TRAIN, Command, Option
from retrain.cli.flags import main_flag, placeholder
from retrain.config import KEYS, SECTIONS, Key
from retrain.config.show import show

WIDTH = 100
INDENT = 6


def render(entry: Command) -> str:
    """The whole help of a command, ending in a newline."""
    parts = [f"usage: {entry.spoken} {entry.usage}".rstrip(), "", entry.summary]
    if entry is TRAIN:
        names = max(map(len, COMMANDS))
        parts += ["", "Other commands (`retrain COMMAND --help`):"]
        parts += [f"  {command.name:<{names}}  {command.summary}" for command in COMMANDS.values()]
    parts += ["", "Options:"]
    parts += [_option(option) for option in (*entry.options, *EVERYWHERE)]
    if entry.config_flags:
        parts += ["", *_flags(entry)]
    return "\n".join(parts) + "\n"


def _flags(entry: Command) -> list[str]:
    if entry is not TRAIN:
        return ["Any key of the config can be given as a flag, as `retrain --help` lists them."]
    lines = ["Flags win over the file. Every key has one; --section.key always works, and --no-FLAG switches off."]
    for section, model in SECTIONS.items():
        lines += ["", f"[{section}] {model.__doc__}".split("\n")[0]]
        lines += [_key(key) for key in KEYS.values() if key.section == section]
    return lines


def _option(option: Option) -> str:
    return _entry(f"{option.flag} {option.metavar}", option.help)


def _key(key: Key) -> str:
    facts = [f"default: {show(key.default)}"]
    if key.range:
        facts.append(key.range)
    flag = main_flag(key)
    head = f"{flag}, --no-{flag[2:]}" if key.type == "bool" else f"{flag} {placeholder(key)}"
    return _entry(head, f"{key.description} ({'; '.join(facts)})")


def _entry(head: str, text: str) -> str:
    pad = " " * INDENT
    return f"  {head.rstrip()}\n" + textwrap.fill(
        text, WIDTH, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False
    )
