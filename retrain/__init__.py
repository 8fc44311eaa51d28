"""retrain: reinforcement-learning post-training for language models.

Public names are imported when first used, so that `import retrain` costs nothing and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrain import backpressure, planning, reward, squeeze
    from retrain.config import Config, load_config
    from retrain.tracking import train
    from retrain.types import ConfigError, RetrainError

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "RetrainError",
    "__version__",
    "backpressure",
    "load_config",
    "planning",
    "reward",
    "squeeze",
    "train",
]

_MODULES = ("backpressure", "planning", "reward", "squeeze")
_HOMES = {
    "Config": "retrain.config",
    "ConfigError": "retrain.types",
    "RetrainError": "retrain.types",
    "load_config": "retrain.config",
    "train": "retrain.tracking",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"retrain.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'retrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
