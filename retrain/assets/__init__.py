"""Models that travel inside the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from retrain.types import ConfigError

PREFIX = "builtin:"
BUILTIN = {"builtin:tiny": Path(__file__).parent / "tiny"}


def resolve_model(name: str) -> str:
    """The folder of a `builtin:` model; any other name (hub id or folder) is returned as it is."""
    if not name.startswith(PREFIX):
        return name
    if name not in BUILTIN:
        nearest = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.0)
        raise ConfigError(f'model.model = "{name}": no such built-in model; did you mean "{nearest[0]}"?')
    return str(BUILTIN[name])
