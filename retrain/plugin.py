"""Plug-ins: functions of the user's own, named by a dotted path in the config; what is imported where. Torch-free."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrain.types import ConfigError


def is_dotted_path(name: str) -> bool:
    """Whether a value names a plug-in ("pkg.mod.fn") and not one of the built-in choices, none of which has a dot."""
    return "." in name


def load_callable(path: str, *, what: str, parameters: Sequence[str]) -> Callable[..., Any]:
    """Import the function that a dotted path names.

    path: "package.module.function"; the working directory counts as a place to import from, after all others.
    what: the config key that holds the path, for messages ("algorithm.advantage_mode").
    parameters: the positional arguments it will be called with, by their names in the documentation.
    Raises ConfigError where the module cannot be imported, or the name in it is missing, not callable, or cannot be
    called with those arguments.
    """
    place = f'{what} = "{path}"'
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f'{place}: not a dotted path; write "package.module.function"')
    module = _import_module(module_name, place)
    if not hasattr(module, name):
        raise ConfigError(f"{place}: module {module_name!r} ({_origin(module)}) has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{place}: {name!r} is {type(function).__name__}, not a function")
    _check_signature(function, place, parameters)
    return function


def child_environment() -> dict[str, str]:
    """Variables for a child process: it sees the modules that this one sees, and its sets have the same order in every
    run."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}


def _import_module(module_name: str, place: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        # The installed command, unlike `python -m`, does not look in the directory it is started from.
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # the module is foreign code and may fail in any way
        raise ConfigError(f"{place}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error


def _check_signature(function: Callable[..., Any], place: str, parameters: Sequence[str]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions written in C may have none to look at; calling them is the check
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise ConfigError(
            f"{place}: it is called with ({', '.join(parameters)}), but its signature is {signature}: {error}"
        ) from error


def _origin(module: Any) -> str:
    return getattr(module, "__file__", None) or "built-in or namespace package"
