"""Putting a run together from its config, and taking it to its end."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain import planning
from retrain.algorithm.sepa import SepaController
from retrain.backend import Backend, open_backend
from retrain.backend.devices import is_out_of_memory
from retrain.backpressure import open_controller
from retrain.config import check_ranks, run_kind
from retrain.distributed import ALONE, RankLost, World, open_world
from retrain.redact import redact
from retrain.training import checkpoint, durable, health
from retrain.training.checkpoint import TrainerState
from retrain.training.collect import Collector
from retrain.training.credit_samples import open_credit_rows
from retrain.training.evaluate import Evaluation
from retrain.training.folder import CONFIG, FINAL, METRICS, FolderOfFirst, RunFolder
from retrain.training.heldout import evaluate_held_out
from retrain.training.interrupt import Interrupted, Interrupts
from retrain.training.loop import NotSaved, Observer, Run, Tracker, run_steps, save, write_checkpoint
from retrain.training.metadata import Metadata
from retrain.training.pipeline import Pipeline
from retrain.training.records import last_row
from retrain.training.source import Source, load_dataset, open_source
from retrain.training.start import (
    Start,
    describe,
    find_start,
    is_finished,
    recheck,
    resolved_toml,
    resume_hint,
)
from retrain.training.together import Quiet, check_same_run, placed
from retrain.types import ConfigError, RetrainError

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
        self.log.info(redact(line))

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        self.log.info("step %d: correct rate %s, loss %s", metrics["step"], metrics["correct_rate"], metrics["loss"])


def train(
    config: Config,
    *,
    observer: Observer | None = None,
    trackers: Sequence[Tracker] = (),
    world: World | None = None,
) -> TrainResult:
    """Run the training that `config` describes, from the start or from `[resume] from`, to `max_steps`.

    trackers: are told as well; `retrain.train` opens those that `config` names. world: the ranks that train together;
    None: as torchrun started this process. The first one speaks, writes and is told.
    Raises ConfigError before anything is written, RetrainError when the run fails, Interrupted (after a checkpoint)
    when SIGINT or SIGTERM stopped it.
    """
    with nullcontext(world) if world else open_world() as ranks:
        if ranks.rank:
            return _run(config, Quiet(), (), ranks)
        return _run(config, observer or LogObserver(), trackers, ranks)


def _run(config: Config, observer: Observer, trackers: Sequence[Tracker], world: World) -> TrainResult:
    if config.campaign is not None:
        raise ConfigError("[campaign]: many runs, not one; start it with `retrain CONFIG.toml`")
    if run_kind(config) == "squeeze":
        raise ConfigError("[squeeze] without [training]: nothing to train; call retrain.squeeze, or add [training]")
    check_ranks(config, world.size)
    log_dir = Path(config.logging.log_dir)
    world.on_loss(lambda: resume_hint(log_dir))
    start = _find_start(config, log_dir, observer.say, world)
    if start is not None:
        observer.say(describe(start, log_dir))
        over = start.state.step >= config.training.max_steps
        if over and world.first(lambda: is_finished(log_dir, start, observer.say)):
            observer.say(f"{log_dir} is finished: it has {start.state.step} steps. Raise --max-steps to go on")
            return _result(log_dir, start.state.step, world)
    with Interrupts(tells=world.rank == 0) as interrupts, ExitStack() as opened:
        with interrupts.anywhere():
            run = open_run(config, start, interrupts, observer, opened, world)
            run.trackers = trackers
        if world.size > 1:
            interrupts.agree = world.any
        try:
            return _finish(run, _begin(run, start))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RetrainError(
                "out of memory on the device. In training, lower training.micro_batch_tokens; in sampling, "
                f"{_batch_key(config)}, group_size or max_tokens. {resume_hint(log_dir)}"
            ) from error
        except OSError as error:
            raise RetrainError(
                f"writing to {log_dir} failed: {error.strerror}. What was written before is complete. "
                f"{resume_hint(log_dir)}"
            ) from error


def _find_start(config: Config, log_dir: Path, say: Callable[[str], None], world: World) -> Start | None:
    """As the first rank finds it. The others get what they need to load it: it alone takes over the records."""
    whole: Start | None = None

    def find() -> Start | None:
        nonlocal whole
        whole = find_start(config, log_dir, say)
        return whole and replace(whole, extents={})

    found = world.first(find)
    return found if world.rank else whole


def _result(log_dir: Path, steps: int, world: World) -> TrainResult:
    return TrainResult(log_dir, steps, world.first(lambda: last_row(log_dir / METRICS)))


def open_run(
    config: Config,
    start: Start | None,
    interrupts: Interrupts,
    observer: Observer,
    opened: ExitStack,
    world: World = ALONE,
) -> Run:
    """Load everything, then take the run folder: what is wrong with the input shows before anything is written.

    A run that goes on in its own folder takes it first: nobody else may change what is loaded.
    opened: closes what is opened here.
    """
    folder = _take_folder(config, start, opened, world) if start and start.in_place else None
    _warn_at_load(config, observer.say)
    state = start.state if start else TrainerState(seed=world.first(lambda: _seed(config)))
    evaluates = config.eval.every > 0
    dataset = load_dataset(config, evaluates=evaluates, say=observer.say)
    own = placed(_fitting(config, state, observer.say), world)
    backend = open_backend(own, seed=state.seed, say=observer.say, world=world)
    source = open_source(config, dataset, backend, evaluates=evaluates, say=observer.say, opened=opened, world=world)
    base_sha256 = backend.base_digest()
    check_same_run(config, source.train.examples, base_sha256, world)
    pipeline = _open_pipeline(config, state, backend, source)
    opened.callback(pipeline.close)

    def evaluate_now() -> Evaluation:
        return pipeline.evaluate(
            state.policy_version, lambda: evaluate_held_out(config, source.held_out, seed=state.seed)
        )

    if start:
        pipeline.restore(start.folder, state.ahead, config.training.batch_size)
        backend.load(start.folder)
    # A server shows here whether it takes the adapter.
    source.engine.stage(state.policy_version)
    detect = planning.open_detector(
        config.planning.detector,
        backend.tokenizer,
        grams=config.logging.strategic_grams,
        model=config.planning.model,
        threshold=config.planning.threshold,
        device=backend.describe()["device"],
    )
    section = {key: getattr(config.sepa, key) for key in type(config.sepa).model_fields}
    return Run(
        config=config,
        state=state,
        folder=folder or _take_folder(config, start, opened, world),
        backend=backend,
        pipeline=pipeline,
        detect=detect,
        sepa=SepaController.from_state(state.sepa, **section) if state.sepa else SepaController(**section),
        interrupts=interrupts,
        observer=observer,
        evaluate=evaluate_now,
        credit_rows=open_credit_rows(backend.tokenizer, config.logging.credit_samples),
        backpressure=open_controller(config, state.backpressure),
        recorded_step=state.step,
        base_sha256=base_sha256,
        world=world,
    )


def _open_pipeline(config: Config, state: TrainerState, backend: Backend, source: Source) -> Pipeline:
    collector = Collector(
        source.train, state.seed, config.training, config.algorithm, config.data, config.reward.max_error_rate
    )
    return Pipeline(
        source.engine,
        collector,
        backend,
        staleness=config.training.max_staleness,
        max_steps=config.training.max_steps,
        prompts_used=state.prompts_used,
    )


def _take_folder(config: Config, start: Start | None, opened: ExitStack, world: World) -> RunFolder:
    folder: RunFolder = FolderOfFirst(Path(config.logging.log_dir))

    def take() -> None:
        nonlocal folder
        folder = RunFolder(folder.path)
        opened.callback(folder.close)
        recheck(config, start, folder.path)

    world.first(take)
    return folder


def _warn_at_load(config: Config, say: Callable[[str], None]) -> None:
    lines = health.at_load(config)
    if lines and config.training.strict:
        raise ConfigError("\n".join(f"{line} (training.strict = true)" for line in lines))
    for line in lines:
        say(line)


def _fitting(config: Config, state: TrainerState, say: Callable[[str], None]) -> Config:
    """With the micro_batch_tokens that memory sufficed for before, unless another value is configured since."""
    configured = config.training.micro_batch_tokens
    if state.fitting is None or state.fitting["configured"] != configured:
        state.fitting = None
        return config
    fits = state.fitting["fits"]
    say(f"training.micro_batch_tokens = {configured} did not fit into memory before: going on with {fits}")
    training = config.training.model_copy(update={"micro_batch_tokens": fits})
    return config.model_copy(update={"training": training})


def _begin(run: Run, start: Start | None) -> Metadata | None:
    """First writes, on the first rank; None on the others."""
    metadata: Metadata | None = None

    def begin() -> None:
        nonlocal metadata
        metadata = _write_beginning(run, start)

    run.world.first(begin)
    run.saved_step = run.state.step
    return metadata


def _write_beginning(run: Run, start: Start | None) -> Metadata:
    """In place: what lies past the checkpoint goes, the records last, which the later checkpoints need.
    Else: the checkpoint of the first step, so that a run can go on from its very beginning, wherever it is killed."""
    resumed = {"from": str(start.folder), "changed": start.changed} if start else None
    _start_trackers(run, forked=start is None or not start.in_place)
    if start is not None and start.in_place:
        checkpoint.go_back(run.folder.path, start.state.step)
        checkpoint.prune(run.folder.path, run.config.training.keep_checkpoints)
        run.folder.adopt(start.log_dir, start.extents)
        return _describe(run, resumed)
    with run.folder.beginning():
        if start is not None:
            run.folder.adopt(start.log_dir, start.extents)
        write_checkpoint(run)
        return _describe(run, resumed)


def _start_trackers(run: Run, *, forked: bool) -> None:
    """A run that goes on keeps its id at wandb; one in another folder is another run."""
    if run.config.logging.wandb_project:
        run.state.wandb_run_id = (None if forked else run.state.wandb_run_id) or secrets.token_hex(4)
    for tracker in run.trackers:
        tracker.start(run.config, run.state.step, run.state.wandb_run_id)


def _describe(run: Run, resumed: dict[str, Any] | None) -> Metadata:
    """Write the resolved config and the metadata."""
    config, log_dir = run.config, run.folder.path
    durable.write_bytes(log_dir / CONFIG, resolved_toml(config))
    facts = {
        "condition": config.algorithm.condition,
        "seed": run.state.seed,
        "model": config.model.model,
        **run.backend.describe(),
        "base_sha256": run.base_sha256,
        "world_size": run.world.size,
        "uncertainty": run.backend.uncertainty,
        "examples": len(run.pipeline.collector.rollouts.examples),
    }
    return Metadata(log_dir, facts, from_step=run.state.step, resumed=resumed)


def _finish(run: Run, metadata: Metadata | None) -> TrainResult:
    log_dir, status = run.folder.path, "failed"
    try:
        _train(run)
        save(run)
        run.world.first(lambda: _write_final(run))
        if run.backend.base_digest() != run.base_sha256:
            raise RetrainError("the base model's weights changed during the run: its results are void")
        status = "finished"
    except Interrupted:
        save(run)
        status = "interrupted"
        raise Interrupted(f"stopped after step {run.state.step}; checkpoint written. {resume_hint(log_dir)}") from None
    finally:
        for tracker in run.trackers:
            tracker.finish(status)
        # A disk that is full must not hide the error that says so.
        with suppress(OSError):
            if metadata is not None:
                metadata.close(step=run.state.step, status=status)
    return _result(log_dir, run.state.step, run.world)


def _train(run: Run) -> None:
    """The loop; what ends it before its time leaves a checkpoint of the last finished step, and removes none."""
    try:
        run_steps(run)
    except (NotSaved, RankLost):
        raise
    except RetrainError as error:
        hint = resume_hint(run.folder.path)
        # Not where it failed between the update and the records, in an evaluation: that step can only be done again.
        if run.recorded_step == run.state.step:
            try:
                save(run, prune=False)
            except RankLost:
                raise error from None  # it failed on this rank alone
            hint = f"Checkpoint of step {run.state.step} written. {hint}"
        raise type(error)(f"{error}\n{hint}") from error


def _batch_key(config: Config) -> str:
    """The key that bounds the prompts of a step."""
    return "backpressure.max_batch_size" if config.backpressure.enabled else "batch_size"


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
