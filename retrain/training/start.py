"""Where a run starts: anew, or from a checkpoint of a run that its config must fit."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.config import KEYS, load_config, value_of
from retrain.training import checkpoint
from retrain.training.checkpoint import Checkpoint
from retrain.training.folder import CONFIG, holds_run
from retrain.training.metadata import read_metadata
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config

# What may differ when a run goes on: how long, what is written and measured, and what changes no number but rounding.
CHANGEABLE = {
    "training.max_steps",
    "training.save_every",
    "training.keep_checkpoints",
    "training.micro_batch_tokens",
    "training.gradient_checkpointing",
    "backend.devices",
    "backend.adapter_path",
    "inference.max_logprob_gap",
    "inference.url",
    "inference.request_timeout_s",
    "inference.retries",
    "reward.judge_url",
    "reward.judge_concurrency",
    "reward.judge_timeout_s",
    "reward.judge_retries",
    "reward.max_error_rate",
}
CHANGEABLE_SECTIONS = {"logging", "eval"}
NOT_CHANGEABLE = {"logging.strategic_grams"}  # decides which tokens plan


def find_start(config: Config, log_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `[resume] from` means, None for a new run.

    Raises ConfigError where there is none, where `config` describes another run than the one it belongs to, and where
    `log_dir` holds a run that this one would write over.
    """
    source = config.resume.from_
    start = checkpoint.find(Path(source), say) if source else None
    if start is not None:
        refused = [key for key in changed_keys(config, start) if not _changeable(key)]
        if refused:
            raise ConfigError(
                f"the run in {start.log_dir} was made with other values of {', '.join(refused)}; resumed with these it "
                f"would be neither run. {resume_hint(start.log_dir)}"
            )
    if holds_run(log_dir) and (start is None or not same_folder(start.log_dir, log_dir)):
        raise ConfigError(
            f"logging.log_dir = {log_dir} already holds a run, which is never written over. {resume_hint(log_dir)}, "
            "or give another --log-dir"
        )
    return start


def changed_keys(config: Config, start: Checkpoint) -> dict[str, list[Any]]:
    """`section.key` -> [value of the run that is resumed, value now]."""
    path = start.log_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"resume.from = {start.log_dir}: its {CONFIG} is missing, so the run cannot be compared")
    was = load_config(path)
    values = {name: [value_of(was, key), value_of(config, key)] for name, key in KEYS.items()}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1] and not name.startswith("resume.")}


def _changeable(key: str) -> bool:
    section = key.partition(".")[0]
    return key in CHANGEABLE or (section in CHANGEABLE_SECTIONS and key not in NOT_CHANGEABLE)


def same_folder(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def is_finished(log_dir: Path, start: Checkpoint) -> bool:
    """Whether the run in `log_dir` ended by itself at the step of `start`, its final adapter written."""
    if not same_folder(start.log_dir, log_dir):
        return False
    last = read_metadata(log_dir).get("sessions", [{}])[-1]
    return last.get("status") == "finished" and last.get("to_step") == start.state.step


def resume_hint(log_dir: Path) -> str:
    return "Go on with: " + shlex.join(["retrain", str(log_dir / CONFIG), "--resume", str(log_dir)])
