"""The command line: finds the command and turns errors into messages and exit statuses."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from retrain import __version__
from retrain.cli.commands import COMMANDS, TRAIN, Command
from retrain.config.dotenv import load_dotenv
from retrain.config.suggest import nearest
from retrain.distributed import several
from retrain.redact import shown
from retrain.types import ConfigError, RetrainError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit status: 0, 1, 2 or 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as exc:
        print(str(exc) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (as in `retrain status | head`); Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RetrainError as exc:
        return _report(str(exc), exc.exit_status, debug)
    except Exception as exc:  # noqa: BLE001 - the last line of defence: said in full with --debug, never hidden
        return _report(f"{type(exc).__name__}: {exc}\nunexpected; --debug shows where", 1, debug)


def _report(message: str, status: int, debug: bool) -> int:
    if debug:
        print(shown(traceback.format_exc()), end="", file=sys.stderr)
    print(f"error: {shown(message)}", file=sys.stderr)
    return status


def _dispatch(words: list[str]) -> int:
    for warning in load_dotenv(os.environ):
        print(f"warning: {warning}", file=sys.stderr)
    entry = COMMANDS.get(words[0], TRAIN) if words else TRAIN
    arguments = words if entry is TRAIN else words[1:]
    if "--version" in arguments:
        print(f"retrain {__version__}")
        return 0
    if "--help" in arguments or "-h" in arguments:
        from retrain.cli.help import render

        print(render(entry), end="")
        return 0
    if entry is not TRAIN and several():
        raise ConfigError(f"{entry.spoken}: runs as one process; start it without torchrun")
    if entry is TRAIN and arguments:
        _refuse_misspelt_command(arguments[0])
    return _module(entry).run(arguments)


def _refuse_misspelt_command(word: str) -> None:
    near = nearest(word, COMMANDS)
    if near is not None and "." not in word and not word.startswith("-") and not Path(word).exists():
        raise ConfigError(f'"{word}": unknown command; did you mean `retrain {near}`?')


def _module(entry: Command):
    """The module of a command. Raises ConfigError for one that this version does not have."""
    try:
        return import_module(entry.module)
    except ModuleNotFoundError as exc:
        if exc.name != entry.module:
            raise
        raise ConfigError(f"{entry.spoken}: not available yet") from None
