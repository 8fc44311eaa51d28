"""Who watches a run: the terminal, and experiment trackers. `train` is training with the trackers its config names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config
    from retrain.distributed import World
    from retrain.training.loop import Observer, Tracker
    from retrain.training.run import TrainResult


def train(config: Config, *, observer: Observer | None = None, world: World | None = None) -> TrainResult:
    """Run the training that `config` describes, from the start or from `[resume] from`, to `max_steps`.

    world: the ranks that train together; None: as torchrun started this process, alone without it.
    Raises ConfigError before anything is written, RetrainError when the run fails, Interrupted (after a checkpoint)
    when SIGINT or SIGTERM stopped it.
    """
    check_packages(config)
    from retrain.training.run import LogObserver
    from retrain.training.run import train as run

    watching = observer or LogObserver()
    return run(config, observer=watching, trackers=open_trackers(config, watching.say), world=world)


def open_trackers(config: Config, say: Callable[[str], None]) -> list[Tracker]:
    """The trackers that `[logging]` names, not yet started. say: where one that fails is reported."""
    trackers: list[Tracker] = []
    if config.logging.wandb_project:
        from retrain.tracking.wandb_run import WandbRun

        trackers.append(Guarded(WandbRun(), "wandb", say))
    if config.logging.tensorboard:
        from retrain.tracking.event_file import EventFile

        trackers.append(Guarded(EventFile(), "TensorBoard", say))
    return trackers


def check_packages(config: Config) -> None:
    """Raise ConfigError for a tracker that is not installed: before torch is imported, which takes seconds."""
    for key in ("wandb_project", "tensorboard"):
        package = key.removesuffix("_project")
        if getattr(config.logging, key):
            try:
                version(package)
            except PackageNotFoundError:
                raise ConfigError(
                    f'logging.{key}: {package} is not installed: pip install "retrain[{package}]", or remove the key'
                ) from None


class Guarded:
    """A tracker that cannot break the run: where it fails after its start, that is said once and it is left alone."""

    def __init__(self, tracker: Tracker, name: str, say: Callable[[str], None]) -> None:
        self.tracker, self.name, self.say = tracker, name, say
        self.lost = False

    def start(self, config: Config, step: int, run_id: str | None) -> None:
        self.tracker.start(config, step, run_id)

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        self._try(f"step {metrics['step']}", lambda: self.tracker.on_step(metrics, generations))

    def finish(self, status: str) -> None:
        self._try("the end", lambda: self.tracker.finish(status))

    def _try(self, when: str, act: Callable[[], None]) -> None:
        if self.lost:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run is worth more; it is said
            self.lost = True
            self.say(
                f"{self.name} failed at {when} and gets nothing from here on ({type(error).__name__}: {error}). "
                "The run goes on; metrics.jsonl has every number"
            )
