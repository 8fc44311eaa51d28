"""Putting a run together from its config, and taking it to its end."""

from __future__ import annotations

import logging
import secrets
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retrain import planning
from retrain.algorithm.sepa import SepaController
from retrain.backend import open_backend
from retrain.config import check_available, dump_toml, without_effect
from retrain.inference import ServerLost
from retrain.training import checkpoint, durable
from retrain.training.checkpoint import Checkpoint, TrainerState
from retrain.training.collect import Collector, RewardsFailed
from retrain.training.evaluate import Evaluation
from retrain.training.folder import CONFIG, FINAL, METRICS, RunFolder, copy_records
from retrain.training.heldout import evaluate_held_out
from retrain.training.interrupt import Interrupted, Interrupts
from retrain.training.loop import Observer, Run, run_steps, save
from retrain.training.metadata import Metadata
from retrain.training.records import last_row
from retrain.training.source import load_dataset, open_source
from retrain.training.start import changed_keys, find_start, is_finished, resume_hint, same_folder
from retrain.types import RetrainError

if TYPE_CHECKING:
    from retrain.config import Config


@dataclass(frozen=True)
class TrainResult:
    """Where a run lies, how many steps it has, and the last line of its metrics (None where no step was made)."""

    log_dir: Path
    steps: int
    metrics: dict[str, Any] | None


class LogObserver:
    """Reports to the `retrain` logger: what a program that calls `retrain.train` gets unless it brings its own."""

    log = logging.getLogger("retrain")

    def say(self, line: str) -> None:
        self.log.info(line)

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        self.log.info("step %d: correct rate %s, loss %s", metrics["step"], metrics["correct_rate"], metrics["loss"])


def train(config: Config, *, observer: Observer | None = None) -> TrainResult:
    """Run the training that `config` describes, from the start or from `[resume] from`, to `max_steps`.

    Raises ConfigError before anything is written, RetrainError when the run fails, Interrupted (after a checkpoint)
    when SIGINT or SIGTERM stopped it.
    """
    observer = observer or LogObserver()
    check_available(config)
    log_dir = Path(config.logging.log_dir)
    start = find_start(config, log_dir, observer.say)
    if start is not None and start.state.step >= config.training.max_steps and is_finished(log_dir, start):
        observer.say(f"{log_dir} is finished: it has {start.state.step} steps. Raise --max-steps to go on")
        return TrainResult(log_dir, start.state.step, last_row(log_dir / METRICS))
    with Interrupts() as interrupts, ExitStack() as opened:
        with interrupts.anywhere():
            run = open_run(config, start, interrupts, observer, opened)
        try:
            return _finish(run, _begin(run, start))
        except torch.OutOfMemoryError as error:
            raise RetrainError(
                "out of memory on the device. In training, lower training.micro_batch_tokens; in sampling, "
                f"batch_size, group_size or max_tokens. {resume_hint(log_dir)}"
            ) from error
        except OSError as error:
            raise RetrainError(
                f"writing to {log_dir} failed: {error.strerror}. What was written before is complete. "
                f"{resume_hint(log_dir)}"
            ) from error


def open_run(
    config: Config, start: Checkpoint | None, interrupts: Interrupts, observer: Observer, opened: ExitStack
) -> Run:
    """Load everything, then take the run folder: what is wrong with the input shows before anything is written.

    opened: closes what is opened here.
    """
    log_dir = Path(config.logging.log_dir)
    for line in without_effect(config):
        observer.say(line)
    if config.training.group_size == 1:
        observer.say("training.group_size = 1: a group of one has nothing to compare with, every advantage is 0")
    state = start.state if start else TrainerState(seed=_seed(config))
    evaluates = config.eval.every > 0
    dataset = load_dataset(config, evaluates=evaluates, say=observer.say)
    backend = open_backend(config, seed=state.seed, say=observer.say)
    source = open_source(config, dataset, backend, evaluates=evaluates, say=observer.say, opened=opened)

    def evaluate_now() -> Evaluation:
        source.engine.publish(state.policy_version)
        return evaluate_held_out(config, source.held_out, seed=state.seed)

    if start:
        backend.load(start.folder)
    # A server shows here whether it takes the adapter.
    source.engine.publish(state.policy_version)
    detect = planning.open_detector(
        config.planning.detector,
        backend.tokenizer,
        grams=config.logging.strategic_grams,
        model=config.planning.model,
        threshold=config.planning.threshold,
        device=backend.describe()["device"],
    )
    section = {key: getattr(config.sepa, key) for key in type(config.sepa).model_fields}
    folder = RunFolder(log_dir)
    opened.callback(folder.close)
    return Run(
        config=config,
        state=state,
        folder=folder,
        backend=backend,
        engine=source.engine,
        collector=Collector(
            source.train,
            state.seed,
            config.training,
            config.algorithm,
            config.data,
            config.reward.max_error_rate,
        ),
        detect=detect,
        sepa=SepaController.from_state(state.sepa, **section) if state.sepa else SepaController(**section),
        interrupts=interrupts,
        observer=observer,
        evaluate=evaluate_now,
    )


def _begin(run: Run, start: Checkpoint | None) -> Metadata:
    """First writes. In place: the records are cut back to the checkpoint. Else: the checkpoint of the first step, so
    that a run can go on from its very beginning, wherever it is killed."""
    config, log_dir = run.config, run.folder.path
    if start is not None and same_folder(start.log_dir, log_dir):
        resumed = _resumed(config, start)
        copy_records(log_dir, log_dir, up_to=start.state.step)
        checkpoint.discard_after(log_dir, start.state.step)
        run.saved_step = start.state.step
        return _describe(run, resumed)
    with run.folder.beginning():
        if start is not None:
            copy_records(start.log_dir, log_dir, up_to=start.state.step)
        save(run)
        return _describe(run, _resumed(config, start) if start else None)


def _resumed(config: Config, start: Checkpoint) -> dict[str, Any]:
    return {"from": str(start.folder), "changed": changed_keys(config, start)}


def _describe(run: Run, resumed: dict[str, Any] | None) -> Metadata:
    """Write the resolved config and the metadata."""
    config, log_dir = run.config, run.folder.path
    resolved = config.model_copy(update={"resume": type(config.resume)()})
    durable.write_bytes(log_dir / CONFIG, dump_toml(resolved).encode())
    facts = {
        "condition": config.algorithm.condition,
        "seed": run.state.seed,
        "model": config.model.model,
        **run.backend.describe(),
        "base_sha256": run.backend.base_digest(),
        "uncertainty": run.backend.uncertainty,
        "examples": len(run.collector.rollouts.examples),
    }
    return Metadata(log_dir, facts, from_step=run.state.step, resumed=resumed)


def _finish(run: Run, metadata: Metadata) -> TrainResult:
    log_dir, status = run.folder.path, "failed"
    try:
        run_steps(run)
        save(run)
        _write_final(run)
        if run.backend.base_digest() != metadata.content["base_sha256"]:
            raise RetrainError("the base model's weights changed during the run: its results are void")
        status = "finished"
    except (ServerLost, RewardsFailed) as error:
        # Completions are sampled and judged at the beginning of a step only: the state is that of the last one.
        save(run)
        written = f"Checkpoint of step {run.state.step} written. {resume_hint(log_dir)}"
        raise type(error)(f"{error}\n{written}") from error
    except Interrupted:
        save(run)
        status = "interrupted"
        raise Interrupted(f"stopped after step {run.state.step}; checkpoint written. {resume_hint(log_dir)}") from None
    finally:
        # A disk that is full must not hide the error that says so.
        with suppress(OSError):
            metadata.close(step=run.state.step, status=status)
    return TrainResult(log_dir, run.state.step, last_row(log_dir / METRICS))


def _seed(config: Config) -> int:
    """The seed of the run; -1 draws one, which the checkpoint and the metadata then know."""
    return config.training.seed if config.training.seed >= 0 else secrets.randbelow(2**31)


def _write_final(run: Run) -> None:
    """final/: the adapter alone, replaced whole."""
    final = run.folder.path / FINAL
    temporary = final.with_name(f".{FINAL}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    run.backend.save_adapter(temporary)
    durable.sync_files(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    durable.sync_folder(run.folder.path)
