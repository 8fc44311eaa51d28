"""What the schema has a key for but this version cannot do yet. Using it is an error, never silence."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from retrain.config.campaign import run_kind
from retrain.config.schema import Config, changed
from retrain.config.show import show_key
from retrain.types import ConfigError

# Keys that must stay at their defaults, with what to write instead where removing them is not the whole answer.
NOT_YET = {
    "backend.backend": 'use "local"',
    "model.base_url": "",
    "backpressure.*": "",
    "logging.wandb_*": "",
    "squeeze.*": "",
}

# Keys of which some values work, the default not always among them.
SOME_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "backend.devices": (lambda value: "," not in value, "name one device"),
}


def unavailable(config: Config) -> list[str]:
    """One line for each setting whose capability is not there yet."""
    if run_kind(config) == "squeeze":
        return ["[squeeze]: a standalone squeeze is not available yet; add a [training] section to train"]
    lines = []
    for path, value in changed(config).items():
        hint = next((hint for pattern, hint in NOT_YET.items() if fnmatchcase(path, pattern)), None)
        if hint is not None:
            lines.append(_line(path, value, hint or "remove it"))
    for path, (works, hint) in SOME_VALUES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        if not works(value):
            lines.append(_line(path, value, hint))
    if config.campaign is not None:
        lines.append("[campaign]: not available yet; remove the section (`retrain explain` shows its runs)")
    return lines


def check_available(config: Config) -> None:
    """Raise ConfigError naming every setting of `config` that a run could not honour."""
    lines = unavailable(config)
    if lines:
        raise ConfigError("\n".join(lines))


def _line(path: str, value: Any, hint: str) -> str:
    return f"{show_key(path, value)}: not available yet; {hint}"
