"""A campaign from its config to its report."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain import __version__
from retrain.campaign import folder as folders
from retrain.campaign import results, squeeze
from retrain.campaign.local import LocalExecutor
from retrain.campaign.manifest import RUNS, Manifest, RunEntry
from retrain.campaign.placement import place
from retrain.campaign.schedule import Executor, Job, run_jobs
from retrain.campaign.table import tables
from retrain.campaign.view import View, counts
from retrain.config import Run, dump_toml, run_matrix, without_effect_in_campaign
from retrain.tracking import check_packages
from retrain.tracking.console import clock, percent
from retrain.training import durable
from retrain.training.folder import METRICS, holds_run
from retrain.training.interrupt import EXIT_STATUS, Interrupted, Interrupts
from retrain.training.metadata import git_commit, now
from retrain.types import ConfigError, RetrainError

if TYPE_CHECKING:
    from retrain.config import Config

CONSOLE_LOG = "console.log"
REPORT = "report.html"
SHOWN_ERROR_LINES = 4


def run_campaign(config: Config, campaign_dir: str | None = None) -> Path:
    """Run, or go on with, the campaign that `config` describes. Returns its folder.

    campaign_dir: exactly this folder; None = a new one below `[logging] log_dir`. Raises ConfigError before anything is
    written, RetrainError when a run failed (after all the others have ended), Interrupted (after the checkpoints of all
    runs) when SIGINT or SIGTERM stopped it.
    """
    matrix = _checked_matrix(config)
    folder = folders.choose_folder(config, campaign_dir)
    folders.check(folder, config)
    with ExitStack() as opened:
        executor, why = _open_executor(config, matrix)
        opened.callback(executor.close)
        view = View()
        folders.hint_of_unfinished(config, campaign_dir, view.say)
        opened.enter_context(folders.taken(folder))
        interrupts = opened.enter_context(Interrupts())
        try:
            manifest = folders.open_manifest(folder, config, matrix)
            manifest.write(folder)
            _open(config, matrix, folder, manifest, f"{len(executor.devices)} at a time ({why})", view)
            with view:
                _run(_Campaign(config, folder, matrix, manifest, view), config, executor, interrupts)
            return _close(folder, manifest, view, interrupted=interrupts.pending)
        except OSError as error:
            raise RetrainError(
                f"writing to {folder} failed: {error.strerror}. What was written before is complete. {_go_on(folder)}"
            ) from error


def _run(campaign: _Campaign, config: Config, executor: Executor, interrupts: Interrupts) -> None:
    assert config.campaign is not None
    run_jobs(
        campaign.jobs(),
        executor,
        campaign,
        stagger_seconds=config.campaign.stagger_seconds if config.campaign.parallel else 0.0,
        interrupted=lambda: interrupts.pending,
    )


def _checked_matrix(config: Config) -> tuple[Run, ...]:
    if config.resume.from_:
        raise ConfigError("resume.from: a campaign goes on with --campaign-dir and its folder; remove it")
    check_packages(config)
    return run_matrix(config)


def _open_executor(config: Config, matrix: tuple[Run, ...]) -> tuple[Executor, str]:
    assert config.campaign is not None
    if config.campaign.executor == "ray":
        from retrain.campaign.ray import RayExecutor

        executor = RayExecutor(config, matrix)
        return executor, executor.why
    placement = place(config, matrix)
    return LocalExecutor(placement.devices, placement.threads), placement.why


def _open(config: Config, matrix: tuple[Run, ...], folder: Path, manifest: Manifest, room: str, view: View) -> None:
    for line in without_effect_in_campaign(config, [run.config for run in matrix]):
        view.say(line)
    steps = f"{manifest.max_steps:,} steps each"
    view.say(
        f"campaign of {len(manifest.conditions)} conditions x {len(manifest.seeds)} seeds, {steps}, {room}: {folder}"
    )
    if manifest.count("finished"):
        view.say(f"going on: {counts(manifest)}")
    made_by, here = (manifest.version, manifest.git_commit), (__version__, git_commit())
    if made_by != here:
        view.say(
            f"warning: begun with retrain {made_by[0]} ({made_by[1]}), going on with {here[0]} ({here[1]}): its runs "
            "may not be comparable"
        )


def _close(folder: Path, manifest: Manifest, view: View, *, interrupted: bool) -> Path:
    """What is said and written at the end."""
    open_runs = [name for name, entry in manifest.runs.items() if entry.state != "finished"]
    manifest.state = "interrupted" if interrupted and open_runs else "failed" if open_runs else "finished"
    manifest.write(folder)
    if manifest.state == "interrupted":
        raise Interrupted(f"stopped: {counts(manifest)}. {_go_on(folder)}")
    found = results.measure(folder, manifest)
    durable.write_json(folder / results.RESULTS, found)
    for part in tables(found):
        view.show(part)
    view.say(f"\nresults:  {folder / results.RESULTS}; runs: `retrain status {shlex.quote(str(folder))}`")
    problems = [
        *(f"{name}: {manifest.runs[name].error or manifest.runs[name].state}" for name in open_runs),
        *([f"squeeze: {manifest.squeeze['error']}"] if manifest.squeeze and "error" in manifest.squeeze else []),
        *_write_report(folder, view),
    ]
    if problems:
        raise RetrainError("\n  ".join([f"{counts(manifest)}. {_go_on(folder)}", *problems]))
    return folder


def _go_on(folder: Path) -> str:
    return f"Go on with the same command and --campaign-dir {shlex.quote(str(folder))}"


def _write_report(folder: Path, view: View) -> list[str]:
    """Why there is none: it must not hide what else went wrong."""
    from retrain.report import write_report

    try:
        view.say(f"report:   {write_report(folder, folder / REPORT)}")
    except RetrainError as error:
        return [f"report: {error}"]
    return []


class _Campaign:
    """Turns runs into jobs, and notes what becomes of them. See `retrain.campaign.schedule.Watcher`."""

    def __init__(self, config: Config, folder: Path, matrix: tuple[Run, ...], manifest: Manifest, view: View) -> None:
        self.config, self.folder, self.manifest, self.view = config, folder, manifest, view
        seeds = manifest.seeds
        # All conditions of a seed before the next seed: wherever it is stopped, there are pairs.
        self.runs = {run.name: run for run in sorted(matrix, key=lambda run: seeds.index(run.seed))}
        self._running: dict[str, tuple[Path, float]] = {}
        self._log_sizes: dict[str, int] = {}
        self._squeezed: str | None = None

    def jobs(self) -> list[Job]:
        """What is left to do."""
        left = [self._job(run) for name, run in self.runs.items() if self.manifest.runs[name].state != "finished"]
        first = next((name for name in self.runs if self.manifest.runs[name].state == "finished"), None)
        return [*self._squeeze_after(first), *left]

    def began(self, job: Job) -> None:
        if job.name == squeeze.NAME:
            return
        entry = self.manifest.runs[job.name]
        entry.state, entry.started, entry.ended, entry.error = "running", now(), None, None
        self._running[job.name] = self._log_dir(job.name), time.monotonic()
        self.manifest.write(self.folder)
        if not self.view.console.is_interactive:
            self.view.say(f"{job.name}: started")

    def ended(self, job: Job, status: int) -> Sequence[Job]:
        if job.name == squeeze.NAME:
            self._note_squeeze(job, status)
            return ()
        entry, log_dir = self.manifest.runs[job.name], self._log_dir(job.name)
        began = self._running.pop(job.name)[1]
        entry.ended = now()
        if folders.is_finished(log_dir, self.manifest.max_steps) and status == 0:
            entry.state = "finished"
        elif status in (EXIT_STATUS, -signal.SIGTERM):
            entry.state = "interrupted"
        else:
            entry.state, entry.error = "failed", _error(job.stderr, self._log_sizes[job.name], status)
        self.manifest.write(self.folder)
        self._say_end(job.name, entry, time.monotonic() - began)
        return self._squeeze_after(job.name) if entry.state == "finished" else ()

    def tick(self) -> None:
        self.view.update(self.manifest, self._running)

    def _say_end(self, name: str, entry: RunEntry, seconds: float) -> None:
        said = f"{name}: {entry.state} after {clock(seconds)}"
        if entry.state == "finished":
            found = results.run_measures(self._log_dir(name) / METRICS, self.manifest.max_steps) or {}
            said += f", correct {percent(found.get('last_tenth'))} in the last tenth; {counts(self.manifest)}"
        if entry.error:
            said += f": {entry.error}"
        self.view.say(said)

    def _log_dir(self, name: str) -> Path:
        return self.folder / RUNS / name

    def _job(self, run: Run) -> Job:
        log_dir = self._log_dir(run.name)
        log_dir.mkdir(parents=True, exist_ok=True)
        toml = log_dir.with_name(f"{run.name}.toml")

        def arguments(device: str) -> list[str]:
            self._log_sizes[run.name] = _size(log_dir / CONSOLE_LOG)
            durable.write_bytes(toml, dump_toml(placed(run, log_dir, device)).encode())
            return [str(toml), *(["--resume", str(log_dir)] if holds_run(log_dir) else [])]

        return Job(run.name, arguments, log_dir / CONSOLE_LOG, log_dir / CONSOLE_LOG)

    def _squeeze_after(self, run: str | None) -> list[Job]:
        """The analysis of the first finished run, where one is wanted and not there yet."""
        done = self.manifest.squeeze is not None and "error" not in self.manifest.squeeze
        if run is None or self.config.squeeze is None or self._squeezed or done:
            return []
        self._squeezed = run
        return [squeeze.job(self.config, self.folder, self._log_dir(run))]

    def _note_squeeze(self, job: Job, status: int) -> None:
        if status == 0:
            analysis = squeeze.read(self.folder)
            self.manifest.squeeze = {"run": self._squeezed, "analysis": analysis}
            self.view.show(squeeze.table(analysis, str(self._squeezed)))
            self._log_squeeze(analysis)
        else:
            self.manifest.squeeze = {"run": self._squeezed, "error": _error(job.stderr, 0, status)}
            self.view.say(f"squeeze of {self._squeezed} failed: {self.manifest.squeeze['error']}")
        self.manifest.write(self.folder)

    def _log_squeeze(self, analysis: dict[str, Any]) -> None:
        if not self.config.logging.wandb_project:
            return
        try:
            squeeze.log_to_wandb(self.config, self.folder, analysis)
        except RetrainError as error:
            self.view.say(f"warning: {error}; squeeze.json has it")


def placed(run: Run, log_dir: Path, device: str) -> Config:
    """The config of a run, with its folder, its device ("" = as it is) and what trackers call it."""
    config = run.config
    logging = {"log_dir": str(log_dir)}
    if config.logging.wandb_project:
        tags = ",".join(filter(None, (run.condition, f"seed{run.seed}", config.logging.wandb_tags)))
        logging |= {"wandb_run_name": run.name, "wandb_group": run.condition, "wandb_tags": tags}
    update: dict[str, Any] = {"logging": config.logging.model_copy(update=logging)}
    if device:
        update["backend"] = config.backend.model_copy(update={"devices": device})
    return config.model_copy(update=update)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _error(log: Path, after: int, status: int) -> str:
    """The message that a failed job ended with, or how it ended. after: bytes of the log that earlier ones wrote."""
    lines = log.read_bytes()[after:].decode("utf-8", "replace").splitlines() if log.exists() else []
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    if not starts or status < 0:
        return f"{how}; see {log}"
    said = [line.removeprefix("error: ") for line in lines[starts[-1] :]]
    return " ".join(said[:SHOWN_ERROR_LINES])
