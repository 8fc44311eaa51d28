"""What the schema has a key for but this version cannot do yet. Using it is an error, never silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retrain.config.schema import Config
from retrain.config.show import show_key
from retrain.types import ConfigError

# Keys of which some values work, the default not always among them.
SOME_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "training.max_staleness": (lambda value: value == 0, "use 0"),
    "backend.devices": (lambda value: "," not in value, "name one device"),
}


def unavailable(config: Config) -> list[str]:
    """One line for each setting whose capability is not there yet."""
    lines = []
    for path, (works, hint) in SOME_VALUES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        shared_out = path == "backend.devices" and config.campaign is not None
        if not works(value) and not shared_out:
            lines.append(_line(path, value, hint))
    return lines


def check_available(config: Config) -> None:
    """Raise ConfigError naming every setting of `config` that a run could not honour."""
    lines = unavailable(config)
    if lines:
        raise ConfigError("\n".join(lines))


def _line(path: str, value: Any, hint: str) -> str:
    return f"{show_key(path, value)}: not available yet; {hint}"
