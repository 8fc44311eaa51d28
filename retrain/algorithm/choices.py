"""Looking a name up in a table of choices, with a helpful error where it is not in there."""

from __future__ import annotations

from collections.abc import Iterable

from retrain.config.suggest import did_you_mean
from retrain.types import ConfigError


def check_choice(what: str, value: str, choices: Iterable[str], *, plugin: bool = False) -> None:
    """Raise ConfigError with the nearest spelling unless value is one of choices.

    what: the config key. plugin: whether a dotted path would have been legal too, for the message.
    """
    choices = list(choices)
    if value in choices:
        return
    also = ", or the dotted path of a function" if plugin else ""
    raise ConfigError(
        f'{what} = "{value}" is not known{did_you_mean(value, choices)} (choices: {", ".join(choices)}{also})'
    )
