"""`retrain [CONFIG.toml]`: train."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.cli.flags import parse
from retrain.config import Config, check_available


def run(argv: Sequence[str]) -> int:
    return train_config(parse(argv).load())


def train_config(config: Config) -> int:
    check_available(config)
    # Torch takes seconds to import: a config that cannot run is refused before that.
    from retrain.tracking.console import ConsoleObserver
    from retrain.tracking.summary import closing_summary
    from retrain.training.run import train

    with ConsoleObserver(config.training.max_steps) as observer:
        observer.say(opening(config))
        result = train(config, observer=observer)
    for line in closing_summary(config, result.log_dir):
        observer.say(line)
    return 0


def opening(config: Config) -> str:
    training = config.training
    return (
        f"{config.model.model} on {config.environment.id or config.data.source}: {config.algorithm.condition}, "
        f"{training.max_steps} steps of {training.batch_size} prompts x {training.group_size} completions, "
        f"into {config.logging.log_dir}"
    )
