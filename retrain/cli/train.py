"""`retrain [CONFIG.toml]`: train."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from retrain.cli.flags import parse
from retrain.cli.ranks import run_ranks, take_nproc, without_nproc
from retrain.config import DEFAULT_PATH, Config, check_ranks, load_config, run_kind
from retrain.distributed import ALONE, World, open_world, several, status_of
from retrain.training.checkpoint import CONFIG, go_on, spare_config
from retrain.types import ConfigError


def run(argv: Sequence[str]) -> int:
    if not several():
        return _run(argv, ALONE)
    rank = 0
    try:
        with open_world() as world:
            rank = world.rank
            return _run(argv, world)
    except (Exception, KeyboardInterrupt) as error:
        if rank:  # the first one says what there is to say
            raise SystemExit(status_of(error)) from None
        raise


def _run(argv: Sequence[str], world: World) -> int:
    parsed = parse(argv)
    try:
        config = parsed.load()
    except ConfigError as error:
        raise ConfigError(f"{error}{_copy_of(parsed.config_path)}") from None
    size = take_nproc(parsed.options["nproc"])
    if size == 1:
        return train_config(config, parsed.options["campaign_dir"], world)
    if world.size > 1:
        raise ConfigError("--nproc: torchrun has started the processes already; leave it out")
    # What is wrong with the config is said once, before anything is started.
    check_ranks(config, size)
    return run_ranks(without_nproc(argv), size)


def _copy_of(path: str | None) -> str:
    """Where the config of a run that was begun cannot be loaded, whatever the flags: what to go on with instead."""
    folder = Path(path or DEFAULT_PATH).parent
    copy = spare_config(folder)
    if copy is None or Path(path or DEFAULT_PATH).name != CONFIG:
        return ""
    with suppress(ConfigError):
        load_config(folder / CONFIG)
        return ""
    return f". The newest checkpoint holds a good copy. {go_on(folder, config=copy)}"


def train_config(config: Config, campaign_dir: str | None = None, world: World = ALONE) -> int:
    check_ranks(config, world.size)
    if config.campaign is not None:
        from retrain.campaign.run import run_campaign

        run_campaign(config, campaign_dir)
        return 0
    if campaign_dir is not None:
        raise ConfigError("--campaign-dir: this config has no [campaign]; a run's folder is --log-dir")
    if run_kind(config) == "squeeze":
        from retrain.cli.squeeze import squeeze

        return squeeze(config)
    # Torch takes seconds to import: a config that cannot run is refused before that.
    from retrain.tracking import train
    from retrain.tracking.console import ConsoleObserver
    from retrain.tracking.summary import closing_summary

    if world.rank:
        train(config, world=world)
        return 0
    with ConsoleObserver(config.training.max_steps) as observer:
        observer.say(opening(config))
        result = train(config, observer=observer, world=world)
    for line in closing_summary(config, result.log_dir):
        observer.say(line)
    return 0


def opening(config: Config) -> str:
    training, adaptive = config.training, config.backpressure
    prompts = f"{adaptive.min_batch_size} to {adaptive.max_batch_size}" if adaptive.enabled else training.batch_size
    return (
        f"{config.model.model} on {config.environment.id or config.data.source}: {config.algorithm.condition}, "
        f"{training.max_steps} steps of {prompts} prompts x {training.group_size} completions, "
        f"into {config.logging.log_dir}"
    )
