"""`[logging] tensorboard`: the numbers of metrics.jsonl as scalars, in `<log_dir>/tensorboard`.

TensorBoard keeps them as float32. It is written by the `tensorboard` package itself, without TensorFlow.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.tracking.figures import figures
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config

FOLDER = "tensorboard"


class EventFile:
    """See `retrain.training.loop.Tracker`."""

    def start(self, config: Config, step: int, run_id: str | None) -> None:
        try:
            # What a .pb2 module holds is made when it is imported.
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                f'logging.tensorboard: tensorboard cannot be imported ({error}); pip install "retrain[tensorboard]"'
            ) from None
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(Path(config.logging.log_dir) / FOLDER))
        if step:
            # What an earlier session wrote past the checkpoint is taken out of the charts.
            restart = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures(metrics).items()]
        self._writer.add_event(
            self._event(wall_time=time.time(), step=metrics["step"], summary=self._summary(value=values))
        )
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()
