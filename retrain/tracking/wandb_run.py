"""`[logging] wandb_project`: the numbers of metrics.jsonl in a wandb run, whose id is in the checkpoint.

The key comes from WANDB_API_KEY or `wandb login`, never from the config. WANDB_MODE=offline writes to <log_dir>/wandb.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retrain.config import KEYS, value_of
from retrain.tracking.figures import figures, words
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config


class WandbRun:
    """See `retrain.training.loop.Tracker`."""

    def start(self, config: Config, step: int, run_id: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f'logging.wandb_project: wandb cannot be imported ({error}); pip install "retrain[wandb]"'
            ) from None
        logging = config.logging
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                entity=logging.wandb_entity or None,
                name=logging.wandb_run_name or config.algorithm.condition,
                group=logging.wandb_group or None,
                tags=[tag.strip() for tag in logging.wandb_tags.split(",") if tag.strip()] or None,
                id=run_id,
                resume="allow",
                reinit="create_new",
                dir=logging.log_dir,
                config=_settings(config),
                # The terminal is the run's own, its live panel included.
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, ValueError, OSError) as error:
            raise ConfigError(
                f'logging.wandb_project = "{logging.wandb_project}": wandb does not start: {error}. Log in with `wandb '
                "login` or WANDB_API_KEY, set WANDB_MODE=offline, or remove the key"
            ) from error

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        # After a crash wandb may have steps past the checkpoint already, and does not take a step twice.
        if metrics["step"] >= self._run.step:
            self._run.log(figures(metrics) | words(metrics), step=metrics["step"])

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


def _settings(config: Config) -> dict[str, Any]:
    """The resolved config as wandb shows it: a table for each section."""
    tables: dict[str, Any] = {"condition": config.algorithm.condition}
    for key in KEYS.values():
        tables.setdefault(key.section, {})[key.name] = value_of(config, key)
    return tables
