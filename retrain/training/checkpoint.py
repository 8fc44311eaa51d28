"""Checkpoints of a run folder: written whole or not at all, found again whatever a crash left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from retrain.training import durable
from retrain.types import ConfigError

TRAINER_STATE = "trainer_state.json"
CHECKPOINTS = "checkpoints"
LOOP_STATE = "loop.json"
_UNFINISHED = ".unfinished_"
_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass
class TrainerState:
    """Where a run stands, beside what the backend keeps.

    step: finished steps. prompts_used: ordinal of the next prompt (the data position). policy_version: optimizer
    steps published. sepa: the SEPA controller's state. recent_correct: correct rates of the last steps, newest last.
    """

    seed: int
    step: int = 0
    prompts_used: int = 0
    policy_version: int = 0
    completion_tokens: int = 0
    sepa: dict[str, Any] = field(default_factory=dict)
    recent_correct: list[float] = field(default_factory=list)
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


def write(log_dir: Path, state: TrainerState, save: Callable[[Path], None], *, keep: int) -> Path:
    """Write checkpoint `state.step` and keep the last `keep` (0 = all); `save` puts the backend's files into a folder.

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
        durable.seal(temporary, step=state.step)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        durable.sync_folder(root)
        durable.write_json(log_dir / TRAINER_STATE, {"checkpoint": f"{CHECKPOINTS}/{final.name}", "step": state.step})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _folders(log_dir)[keep:] if keep else ():
        # The checkpoint is written; what cannot be removed now is tried again after the next one.
        shutil.rmtree(old, ignore_errors=True)
    return final


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
            "names the newest, is missing or unreadable. Start anew with another --log-dir"
        )
    return _open(path / CHECKPOINTS / newest, path)


def named(log_dir: Path) -> str | None:
    """Name of the checkpoint that trainer_state.json points at; None where that file is missing or unreadable."""
    try:
        name = Path(json.loads((log_dir / TRAINER_STATE).read_bytes())["checkpoint"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if _FOLDER.fullmatch(name) else None


def discard_after(log_dir: Path, step: int) -> None:
    """Remove what a crash left unfinished and every checkpoint later than `step`: the run goes on from there."""
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
        earlier = (other for other in _folders(log_dir) if step_of(other.name) < step_of(folder.name))
        good = next((other for other in earlier if durable.damage(other) is None), None)
        remedy = f"Go on from the previous good one with --resume {good}" if good else "No good one before it is left"
        raise ConfigError(f"checkpoint {folder} is damaged: {problem}. {remedy}")
    values = json.loads((folder / LOOP_STATE).read_bytes())
    known = {item.name for item in fields(TrainerState)}
    if set(values) != known:
        raise ConfigError(
            f"checkpoint {folder} was written by another version of retrain: {LOOP_STATE} has other keys "
            f"({', '.join(sorted(set(values) ^ known))}). Resume it with that version"
        )
    return Checkpoint(folder, log_dir, TrainerState(**values))
