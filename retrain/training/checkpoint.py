"""Checkpoints of a run folder: written whole or not at all, found again whatever a crash left behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from retrain.training import durable
from retrain.types import SERVICE_STATE, ConfigError

CONFIG = "config.toml"
TRAINER_STATE = "trainer_state.json"
CHECKPOINTS = "checkpoints"
LOOP_STATE = "loop.json"
EXTENTS = "records.json"
_UNFINISHED = ".unfinished_"
_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass
class TrainerState:
    """Where a run stands, beside what the backend keeps.

    step: finished steps. prompts_used: ordinal of the next prompt (the data position). policy_version: optimizer
    steps published. sepa: the SEPA controller's state. recent_correct: correct rates of the last steps, newest last.
    skipped_steps: those taken back because something was not finite. fitting: {"configured", "fits"}, values of
    micro_batch_tokens, where memory did not suffice for the one configured. ahead: [step, policy version] of each batch
    that is sampled already (`retrain.training.pipeline`). health: what `retrain.training.health` remembers.
    """

    seed: int
    step: int = 0
    prompts_used: int = 0
    policy_version: int = 0
    completion_tokens: int = 0
    sepa: dict[str, Any] = field(default_factory=dict)
    recent_correct: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    fitting: dict[str, int] | None = None
    ahead: list[list[int]] = field(default_factory=list)
    health: dict[str, Any] = field(default_factory=dict)
    backpressure: dict[str, Any] | None = None
    wandb_run_id: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, the run it belongs to, and the loop's state in it."""

    folder: Path
    log_dir: Path
    state: TrainerState


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(name: str) -> int:
    """The step of a checkpoint folder's name."""
    return int(name.removeprefix("step_"))


def write(
    log_dir: Path, state: TrainerState, save: Callable[[Path], None], *, keep: int, beside: Mapping[str, bytes] = {}
) -> Path:
    """Write checkpoint `state.step` and keep the last `keep` (0 = all); `save` puts the backend's files into a folder.

    beside: what the checkpoint is to vouch for as well, file name -> content.
    On any failure the half-written folder is removed and the checkpoints that were there stay as they were.
    """
    root = log_dir / CHECKPOINTS
    root.mkdir(exist_ok=True)
    final = root / folder_name(state.step)
    temporary = root / (_UNFINISHED + final.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save(temporary)
        durable.write_json(temporary / LOOP_STATE, asdict(state))
        for name, content in beside.items():
            (temporary / name).write_bytes(content)
        durable.seal(temporary, step=state.step)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        durable.sync_folder(root)
        _point_at(log_dir, state.step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(log_dir, keep)
    return final


def prune(log_dir: Path, keep: int) -> None:
    """Keep the last `keep` (0 = all). What cannot be removed now is tried again after the next checkpoint."""
    for old in _folders(log_dir)[keep:] if keep else ():
        shutil.rmtree(old, ignore_errors=True)


def _point_at(log_dir: Path, step: int) -> None:
    name = folder_name(step)
    service = log_dir / CHECKPOINTS / name / SERVICE_STATE
    kept = {"service": json.loads(service.read_bytes())} if service.is_file() else {}
    durable.write_json(log_dir / TRAINER_STATE, {"checkpoint": f"{CHECKPOINTS}/{name}", "step": step} | kept)


def find(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint to resume from: the newest complete one of a log folder, or exactly the one `path` names.

    A folder newer than the one trainer_state.json names may be half-written by a crash and is passed over. Damage to
    the one that is named is never passed over: ConfigError names the file and offers the newest good one before it.
    """
    if not path.is_dir():
        raise ConfigError(f"resume.from = {path}: no such folder. Give the log_dir of a run")
    real = path.resolve()
    if real in _folders(real.parent.parent):
        return _open(real, real.parent.parent)
    folders = _folders(path)
    if not folders:
        raise ConfigError(
            f"resume.from = {path}: there is no checkpoint in it. Give the log_dir of a run that has written one "
            f"(it holds {TRAINER_STATE}), or start anew with another --log-dir"
        )
    newest = named(path)
    if newest is None:
        say(f"{path / TRAINER_STATE} is missing or damaged: going by the newest complete checkpoint")
    for folder in folders:
        if newest is not None and step_of(folder.name) <= step_of(newest):
            break
        problem = durable.damage(folder)
        if problem is None:
            return _open(folder, path)
        say(f"passing over {folder}: it is not complete ({problem})")
    if newest is None:
        raise ConfigError(
            f"resume.from = {path}: none of its {len(folders)} checkpoints is complete, and {TRAINER_STATE}, which "
            f"names the newest, is missing or damaged. {start_anew(path)}"
        )
    return _open(path / CHECKPOINTS / newest, path)


def named(log_dir: Path) -> str | None:
    """Name of the checkpoint that trainer_state.json points at; None where that file is missing or damaged."""
    try:
        values = json.loads((log_dir / TRAINER_STATE).read_bytes())
        name = folder_name(values["step"])
        return name if values["checkpoint"] == f"{CHECKPOINTS}/{name}" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def go_back(log_dir: Path, step: int) -> None:
    """Make checkpoint `step` the newest: the later ones go, and what a crash left unfinished.

    Cut short, it leaves a run that goes on from one of the later ones, whose records must still be there.
    """
    _point_at(log_dir, step)
    for folder in (log_dir / CHECKPOINTS).glob(_UNFINISHED + "*"):
        shutil.rmtree(folder)
    for folder in _folders(log_dir):
        if step_of(folder.name) > step:
            shutil.rmtree(folder)


def _folders(log_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first; a copy that somebody put beside them under another name is not one."""
    found = [folder for folder in (log_dir / CHECKPOINTS).glob("step_*") if _FOLDER.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: step_of(folder.name), reverse=True)


def _open(folder: Path, log_dir: Path) -> Checkpoint:
    problem = durable.damage(folder) if folder.is_dir() else "it is missing"
    if problem is not None:
        good = next((other for other in others(folder) if durable.damage(other) is None), None)
        remedy = go_on(log_dir, good) if good else f"No good one is left. {start_anew(log_dir)}"
        raise ConfigError(f"checkpoint {folder} is damaged: {problem}. {remedy}")
    values = json.loads((folder / LOOP_STATE).read_bytes())
    known = {item.name for item in fields(TrainerState)}
    if set(values) != known:
        raise ConfigError(
            f"checkpoint {folder} was written by another version of retrain: {LOOP_STATE} has other keys "
            f"({', '.join(sorted(set(values) ^ known))}). Resume it with that version"
        )
    return Checkpoint(folder, log_dir, TrainerState(**values))


def others(folder: Path) -> list[Path]:
    """The other checkpoint folders of the same run: the older ones, newest first, then the newer ones."""
    found = [other for other in _folders(folder.parent.parent) if other.name != folder.name]
    return sorted(found, key=lambda other: step_of(other.name) > step_of(folder.name))


def spare_config(log_dir: Path) -> Path | None:
    """The config in the newest complete checkpoint."""
    return next((folder / CONFIG for folder in _folders(log_dir) if durable.damage(folder) is None), None)


def go_on(log_dir: Path, source: Path | None = None, *, config: Path | None = None) -> str:
    """The sentence that says how: from the run's newest checkpoint, or from the one in `source`."""
    return f"Go on with: {_command(config or _config(log_dir), '--resume', source or log_dir)}"


def start_anew(log_dir: Path) -> str:
    """The sentence that says how, for a run that cannot go on."""
    return f"Start anew with: {_command(_config(log_dir), '--log-dir', log_dir.with_name(log_dir.name + '-again'))}"


def _config(log_dir: Path) -> Path:
    path = log_dir / CONFIG
    return path if path.is_file() else spare_config(log_dir) or path


def _command(*words: object) -> str:
    return shlex.join(["retrain", *map(str, words)])
