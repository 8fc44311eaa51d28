"""The folder of a campaign: where it lies, who may write to it, and what of it is done already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from retrain import __version__
from retrain.campaign.manifest import (
    MANIFEST,
    RUNS,
    Manifest,
    RunEntry,
    config_digest,
    differences,
    holds_campaign,
    read_manifest,
)
from retrain.config import Run, to_dict
from retrain.config.show import show
from retrain.training.folder import LOCK, RunFolder, owner
from retrain.training.metadata import git_commit, now, read_metadata
from retrain.types import ConfigError, RetrainError

if TYPE_CHECKING:
    from retrain.config import Config

PREFIX = "campaign_"
SHOWN_DIFFERENCES = 10


def choose_folder(config: Config, campaign_dir: str | None) -> Path:
    """`campaign_dir` itself, or a new name below the config's log_dir."""
    if campaign_dir is not None:
        return Path(campaign_dir)
    base = Path(config.logging.log_dir) / f"{PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    candidates = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))]
    return next(folder for folder in candidates if not folder.exists())


def unfinished(config: Config, log_dir: Path) -> Path | None:
    """The newest campaign below `log_dir`, where it is one of this very config, not finished and not running."""
    folders = sorted(folder for folder in log_dir.glob(f"{PREFIX}*") if holds_campaign(folder))
    if not folders:
        return None
    manifest = read_manifest(folders[-1])
    same = manifest.config_sha256 == config_digest(to_dict(config))
    return folders[-1] if same and manifest.state != "finished" and owner(folders[-1]) is None else None


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """The folder for this process alone, as long as it lives. Raises ConfigError while another has it."""
    if owner(folder) is not None:
        raise ConfigError(f"{folder} is in use by process {owner(folder)}; wait for it, or give another --campaign-dir")
    lock = RunFolder(folder)
    try:
        yield
    finally:
        lock.close()


def check(folder: Path, config: Config) -> None:
    """Raise ConfigError where `folder` holds anything but nothing, or a campaign of this config."""
    if holds_campaign(folder):
        _check_same(folder, read_manifest(folder), config)
    elif folder.exists() and any(path.name not in (LOCK, RUNS) for path in _entries(folder)):
        raise ConfigError(f"--campaign-dir {folder}: holds something else than a campaign; give a new or empty folder")


def open_manifest(folder: Path, config: Config, matrix: tuple[Run, ...]) -> Manifest:
    """The manifest of the campaign in `folder`, as its runs stand now; a new one where there is none."""
    (folder / RUNS).mkdir(exist_ok=True)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        manifest.state = "running"
    else:
        assert config.campaign is not None
        manifest = Manifest(
            config=to_dict(config),
            runs={run.name: RunEntry(run.condition, run.seed) for run in matrix},
            conditions=list(dict.fromkeys(run.condition for run in matrix)),
            seeds=list(config.campaign.seeds),
            max_steps=matrix[0].config.training.max_steps,
            created=now(),
            version=__version__,
            git_commit=git_commit(),
        )
    for name, entry in manifest.runs.items():
        # What the run says of itself counts: whoever started it may have been killed before noting it.
        entry.state = "finished" if is_finished(folder / RUNS / name, manifest.max_steps) else "waiting"
    return manifest


def is_finished(log_dir: Path, max_steps: int) -> bool:
    """Whether the run ended by itself, its final adapter written."""
    last = read_metadata(log_dir).get("sessions", [{}])[-1]
    return last.get("status") == "finished" and last.get("to_step") == max_steps


def hint_of_unfinished(config: Config, campaign_dir: str | None, say: Callable[[str], None]) -> None:
    """Where a new campaign is begun beside one that waits to be continued, say so."""
    if campaign_dir is not None:
        return
    try:
        found = unfinished(config, Path(config.logging.log_dir))
    except RetrainError as error:
        say(f"warning: {error}")
        return
    if found is not None:
        manifest = read_manifest(found)
        say(
            f"{found} is this campaign with {manifest.count('finished')} of {len(manifest.runs)} runs finished: to go "
            f"on with it, stop this one and add --campaign-dir {found}"
        )


def _check_same(folder: Path, manifest: Manifest, config: Config) -> None:
    different = differences(manifest.config, to_dict(config))
    if not different:
        return
    lines = [f"  {key}: {_shown(there)} there, {_shown(here)} here" for key, there, here in different]
    if len(lines) > SHOWN_DIFFERENCES:
        lines[SHOWN_DIFFERENCES:] = [f"  and {len(lines) - SHOWN_DIFFERENCES} more"]
    raise ConfigError(
        "\n".join(
            [
                f"--campaign-dir {folder}: holds the campaign of another config; give the config it was made with, or "
                "another folder. What differs:",
                *lines,
            ]
        )
    )


def _shown(value: object) -> str:
    return "absent" if value is None else show(value)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except NotADirectoryError:
        raise ConfigError(f"--campaign-dir {folder}: is a file; give a folder") from None
