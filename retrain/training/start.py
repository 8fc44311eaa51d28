"""Where a run starts: anew, or from a checkpoint of a run that its config must fit."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.config import KEYS, dump_toml, load_config, value_of
from retrain.training import checkpoint, durable
from retrain.training.checkpoint import CONFIG, EXTENTS, Checkpoint, TrainerState, go_on, start_anew
from retrain.training.extent import Extent
from retrain.training.folder import FINAL, METADATA, RunFolder, holds_run, in_use, owner, verify_records
from retrain.training.metadata import read_metadata
from retrain.types import ConfigError, RetrainError

if TYPE_CHECKING:
    from retrain.config import Config

# What may differ when a run goes on: how long, what is written and measured, and what changes no number but rounding.
CHANGEABLE = {
    "training.max_steps",
    "training.save_every",
    "training.keep_checkpoints",
    "training.micro_batch_tokens",
    "training.gradient_checkpointing",
    "training.strict",
    "backend.devices",
    "backend.sharding",
    "backend.adapter_path",
    "backend.max_concurrent",
    "backend.patience_s",
    "backend.state_ttl_s",
    "model.base_url",
    "inference.max_logprob_gap",
    "inference.url",
    "inference.allow_http",
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


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run can go on from: everything about it is verified.

    in_place: in the folder of the run that wrote it; else this is a fork. changed: `section.key` -> [value when it was
    written, value now].
    """

    folder: Path
    log_dir: Path
    state: TrainerState
    in_place: bool
    changed: Mapping[str, list[Any]]
    extents: Mapping[str, Extent]


def find_start(config: Config, log_dir: Path, say: Callable[[str], None]) -> Start | None:
    """Where `[resume] from` means to go on, None for a new run.

    Raises ConfigError where there is no such checkpoint, where it or the records up to it are damaged, where `config`
    describes another run than the one it belongs to, and where `log_dir` holds a run that this one would write over.
    """
    if owner(log_dir) is not None:
        raise in_use(log_dir)
    source = config.resume.from_
    found = checkpoint.find(Path(source), say) if source else None
    in_place = found is not None and same_folder(found.log_dir, log_dir)
    changed = changed_keys(config, found) if found else {}
    refused = _refused(changed)
    if found and refused:
        raise ConfigError(
            f"the run in {found.log_dir} was made with other values of {', '.join(refused)}; resumed with these it "
            f"would be neither run. {_go_on_as_it_was(found)}"
        )
    if not in_place:
        _refuse_to_write_over(log_dir)
    if found is None:
        return None
    if in_place and not read_metadata(log_dir):
        say(f"{log_dir / METADATA} is missing: it begins again with this session")
    return Start(found.folder, found.log_dir, found.state, in_place, changed, _verified_extents(found))


def recheck(config: Config, start: Start | None, log_dir: Path) -> None:
    """Once `log_dir` is locked. Raises ConfigError where another process was faster, while this one was loading."""
    if start is None or not start.in_place:
        _refuse_to_write_over(log_dir)
    elif checkpoint.find(Path(config.resume.from_), lambda line: None).folder != start.folder:
        raise ConfigError(f"another process went on with {log_dir} while this one was loading. {go_on(log_dir)}")


def _refuse_to_write_over(log_dir: Path) -> None:
    if holds_run(log_dir):
        raise ConfigError(
            f"logging.log_dir = {log_dir} already holds a run, which is never written over. {go_on(log_dir)}, "
            "or give another --log-dir"
        )


def describe(start: Start, log_dir: Path) -> str:
    """One line: what is gone on with, and what has changed."""
    changes = ", ".join(f"{key} {was!r} -> {now!r}" for key, (was, now) in start.changed.items())
    what = "going on from" if start.in_place else f"{log_dir} becomes a fork of"
    return f"{what} {start.folder}" + (f"; changed: {changes}" if changes else "")


def beside(config: Config, folder: RunFolder) -> dict[str, bytes]:
    """What a checkpoint holds beside the state, for a resume to compare with: file name -> content."""
    return {CONFIG: resolved_toml(config), EXTENTS: folder.extents()}


def resolved_toml(config: Config) -> bytes:
    """The config of the run itself, however it was begun."""
    return dump_toml(config.model_copy(update={"resume": type(config.resume)()})).encode()


def changed_keys(config: Config, start: Checkpoint) -> dict[str, list[Any]]:
    """`section.key` -> [value when the checkpoint was written, value now]."""
    was = load_config(start.folder / CONFIG)
    values = {name: [value_of(was, key), value_of(config, key)] for name, key in KEYS.items()}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1] and not name.startswith("resume.")}


def _refused(changed: Mapping[str, Any]) -> list[str]:
    return [key for key in changed if not _changeable(key)]


def _go_on_as_it_was(start: Checkpoint) -> str:
    """With the run's config.toml or, where that is what was altered, with the copy of it."""
    path = start.log_dir / CONFIG
    try:
        fits = not _refused(changed_keys(load_config(path), start))
    except ConfigError:
        fits = False
    if fits:
        return go_on(start.log_dir)
    return f"{path} was altered, the checkpoint holds a copy. {go_on(start.log_dir, config=start.folder / CONFIG)}"


def resume_hint(log_dir: Path) -> str:
    """What to do after a failure, in one sentence."""
    if holds_run(log_dir) and checkpoint.spare_config(log_dir):
        return go_on(log_dir)
    return "It had not begun: start it again with the same command"


def _changeable(key: str) -> bool:
    section = key.partition(".")[0]
    return key in CHANGEABLE or (section in CHANGEABLE_SECTIONS and key not in NOT_CHANGEABLE)


def _verified_extents(start: Checkpoint) -> dict[str, Extent]:
    """How far the run's records are those of the checkpoint. Raises ConfigError where they are damaged before that."""
    try:
        return verify_records(start.log_dir, _extents(start.folder))
    except RetrainError as error:
        good = next(filter(_whole, checkpoint.others(start.folder)), None)
        remedy = go_on(start.log_dir, good) if good else start_anew(start.log_dir)
        raise ConfigError(f"{error}. It belongs to the run up to step {start.state.step}. {remedy}") from None


def _whole(folder: Path) -> bool:
    """Whether a checkpoint and the records up to it are undamaged."""
    if durable.damage(folder) is not None:
        return False
    try:
        verify_records(folder.parent.parent, _extents(folder))
    except RetrainError:
        return False
    return True


def _extents(folder: Path) -> dict[str, Any]:
    return json.loads((folder / EXTENTS).read_bytes())


def same_folder(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def is_finished(log_dir: Path, start: Start, say: Callable[[str], None]) -> bool:
    """Whether the run in `log_dir` ended by itself at the step of `start`, its config and final adapter undamaged."""
    if not start.in_place:
        return False
    last = (read_metadata(log_dir).get("sessions") or [{}])[-1]
    if last.get("status") != "finished" or last.get("to_step") != start.state.step:
        return False
    names = [path.name for path in start.folder.glob("adapter_*")]
    lost = [log_dir / FINAL / name for name in names if not _same_file(start.folder / name, log_dir / FINAL / name)]
    lost += [] if _same_file(start.folder / CONFIG, log_dir / CONFIG) else [log_dir / CONFIG]
    for path in lost:
        say(f"{path} is missing or not as it was: it is written again")
    tidy = checkpoint.named(log_dir) == start.folder.name and not durable.leftovers(log_dir)
    return tidy and not lost


def _same_file(a: Path, b: Path) -> bool:
    return b.is_file() and filecmp.cmp(a, b, shallow=False)
