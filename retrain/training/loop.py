"""The loop: publish, prompts, completions, rewards, advantages, one training step, records, checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retrain.algorithm.sepa import SepaController
from retrain.backend import Backend
from retrain.backpressure import Controller
from retrain.distributed import ALONE, World
from retrain.training import checkpoint, health
from retrain.training.batching import Credited, Detector, credit
from retrain.training.checkpoint import TrainerState
from retrain.training.collect import Collected
from retrain.training.credit_samples import CreditRows, no_credit_rows
from retrain.training.evaluate import Evaluation
from retrain.training.folder import CREDIT, GENERATIONS, METRICS, NONFINITE, RunFolder
from retrain.training.interrupt import Interrupts
from retrain.training.metrics import (
    RUNNING_STEPS,
    STAGES,
    RewardSummary,
    generation_rows,
    nonfinite_rows,
    step_metrics,
    summarize,
)
from retrain.training.pipeline import Pipeline, Sampled
from retrain.training.squeezing import squeeze_if_due
from retrain.training.start import beside, resume_hint
from retrain.training.stopwatch import Stopwatch
from retrain.training.together import check_replicas
from retrain.types import RetrainError, ServerLost, StepResult

if TYPE_CHECKING:
    from retrain.config import Config


class Observer(Protocol):
    """Watches a run: the terminal view, a tracker."""

    def say(self, line: str) -> None:
        """One line about what is going on."""
        ...

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        """A step is finished and recorded."""
        ...


class Tracker(Protocol):
    """Writes a run's numbers elsewhere as well. It is told of the beginning and the end, and never breaks the run."""

    def start(self, config: Config, step: int, run_id: str | None) -> None:
        """Before anything is written. step: finished steps. run_id: `TrainerState.wandb_run_id`.

        Raises ConfigError where it cannot write at all.
        """
        ...

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        """As of an Observer."""
        ...

    def finish(self, status: str) -> None:
        """status: as in metadata.json."""
        ...


@dataclass
class Run:
    """The parts of a running experiment, put together by `retrain.training.run.open_run`.

    recorded_step: the last step that is finished and in the records; where it is the state's, the run can go on there.
    base_sha256: `Backend.base_digest` before the run. world: the ranks that run the same loop; the first one writes.
    """

    config: Config
    state: TrainerState
    folder: RunFolder
    backend: Backend
    pipeline: Pipeline
    detect: Detector
    sepa: SepaController
    interrupts: Interrupts
    observer: Observer
    evaluate: Callable[[], Evaluation]
    trackers: Sequence[Tracker] = ()
    credit_rows: CreditRows = no_credit_rows
    backpressure: Controller | None = None
    recorded_step: int = 0
    saved_step: int | None = None
    base_sha256: str | None = None
    world: World = ALONE


class NotSaved(RetrainError):
    """A checkpoint could not be written."""


def run_steps(run: Run) -> None:
    """Train until max_steps. Raises Interrupted, with the run's state at a finished step, when a signal came, and
    NotLearning, likewise, where the run's health ends it."""
    while run.state.step < run.config.training.max_steps:
        state, watch = run.state, Stopwatch()
        batch_size = run.backpressure.batch_size if run.backpressure else run.config.training.batch_size
        with run.interrupts.anywhere():
            sampled = run.pipeline.take(state.step, state.policy_version, batch_size, watch)
        got = sampled.batch
        others = _origin(run, sampled)
        summary = summarize(got.sampled)
        sepa_lambda = run.sepa.value(state.step, summary.correct_rate)
        credited = credit(
            got.groups,
            run.config.algorithm,
            max_tokens=run.config.training.max_tokens,
            detect=run.detect,
            sepa_lambda=sepa_lambda,
        )
        with watch("train"):
            learned = _learn(run, credited)
        _advance(run, got, summary)
        others |= _balance(run, summary, credited, learned, watch)
        others |= squeeze_if_due(run.config, state, run.backend, run.observer.say)
        _record(run, got, summary, credited, learned, watch, others)
        if state.step % run.config.training.save_every == 0:
            save(run)


def _origin(run: Run, sampled: Sampled) -> dict[str, Any]:
    """Where a batch came from. Figures for the metrics."""
    return {
        "sampler_version": sampled.version,
        "staleness": run.state.policy_version - sampled.version,
        "servers_alive": run.pipeline.engine.servers_alive,
    }


def _learn(run: Run, credited: Credited) -> StepResult:
    """One training step, and with it a new policy version; nothing where no group carried a gradient, or where the
    backend took the step back."""
    if not credited.batch.rollouts:
        return StepResult()
    learned = run.backend.step(credited.batch, run.state.step)
    _remember_budget(run, learned)
    if learned.skipped:
        run.state.skipped_steps += 1
        return learned
    run.state.policy_version += 1
    run.sepa.observe(learned.metrics["exec_uncertainty_var"])
    return learned


def _remember_budget(run: Run, learned: StepResult) -> None:
    """Say once that memory did not suffice, and keep what did."""
    configured, fits = run.config.training.micro_batch_tokens, learned.metrics.get("micro_batch_tokens")
    known = run.state.fitting["fits"] if run.state.fitting else configured
    if fits is None or fits >= known:
        return
    run.state.fitting = {"configured": configured, "fits": int(fits)}
    run.observer.say(
        f"out of memory in training: the step was done again with {fits} tokens at a time, to the same loss, and the "
        f"run goes on with them; set training.micro_batch_tokens = {fits} (now {configured}) for the next one"
    )


def _advance(run: Run, got: Collected, summary: RewardSummary) -> None:
    state = run.state
    state.step += 1
    state.sepa = run.sepa.state()
    state.prompts_used = got.prompts_used
    state.completion_tokens += summary.completion_tokens
    if summary.correct_rate is not None:
        state.recent_correct = [*state.recent_correct, summary.correct_rate][-RUNNING_STEPS:]


def _balance(
    run: Run, summary: RewardSummary, credited: Credited, learned: StepResult, watch: Stopwatch
) -> dict[str, Any]:
    """Tell the batch size's controller what the step took on the first rank. Figures for the metrics."""
    if run.backpressure is None:
        return {}
    trained = 0 if learned.skipped else credited.batch.num_tokens
    work = {"sample": summary.completion_tokens, "train": trained}
    seconds = run.world.first(lambda: watch.stages)
    figures = run.backpressure.finish_step([(tokens, seconds[stage]) for stage, tokens in work.items()])
    run.state.backpressure = run.backpressure.state()
    return figures


def _record(
    run: Run,
    got: Collected,
    summary: RewardSummary,
    credited: Credited,
    learned: StepResult,
    watch: Stopwatch,
    others: dict[str, Any],
) -> None:
    config, state, step_time = run.config, run.state, watch.total
    due = config.eval.every and state.step % config.eval.every == 0
    evaluation = run.evaluate() if due else None
    metrics = step_metrics(
        step=state.step,
        condition=config.algorithm.condition,
        summary=summary,
        learned=learned.metrics,
        recent_correct=state.recent_correct,
        num_datums=len(credited.batch.rollouts),
        uncertainty=run.backend.uncertainty,
        sepa_lambda=credited.batch.sepa_lambda,
        sepa_gate_open=run.sepa.gate_open,
        policy_version=state.policy_version,
        skipped=learned.skipped,
        skipped_steps=state.skipped_steps,
        batch_size=len(got.sampled),
        group_size=config.training.group_size,
        world_size=run.world.size,
        **got.figures,
        **run.backend.figures(),
        **others,
        eval_correct_rate=evaluation.pass_at[1].value if evaluation and evaluation.pass_at else None,
        **{f"{stage}_time_s": watch.stages.get(stage, 0.0) for stage in STAGES},
        step_time_s=step_time,
        tokens_per_s=summary.completion_tokens / step_time,
        peak_memory_bytes=run.backend.peak_memory_bytes(),
    )
    report = health.examine(config, metrics, state.health)
    state.health = report.memory
    metrics["warnings"] = [finding.name for finding in report.holding]
    # A step that was taken back has no figures.
    uncertainty = dict(zip(credited.members, learned.uncertainty, strict=not learned.skipped))
    # Groups that dynamic sampling set aside were sampled and scored as well, but have no advantage.
    advantages_PG = credited.advantages_PG + [[None] * len(group.completions) for group in got.uniform]
    rows = generation_rows(state.step, got.sampled, advantages_PG, uncertainty)
    run.folder.append(METRICS, [metrics])
    run.folder.append(GENERATIONS, rows)
    run.folder.append(CREDIT, run.credit_rows(state.step, got.groups, credited, learned))
    if learned.skipped:
        run.folder.append(NONFINITE, nonfinite_rows(state.step, got.groups, credited.members, credited.batch, learned))
    run.recorded_step = state.step
    for watcher in (run.observer, *run.trackers):
        watcher.on_step(metrics, rows)
    _warn(run, report)


def _warn(run: Run, report: health.Report) -> None:
    """Say what is new. Raises NotLearning for what ends the run: everything, with `training.strict`."""
    strict = run.config.training.strict
    ending = [finding for finding in report.holding if strict or finding.fatal]
    for finding in report.said:
        if finding not in ending:
            run.observer.say(f"warning: {finding.line}")
    if ending:
        because = " (training.strict = true)" if strict else ""
        raise health.NotLearning("\n".join(f"{finding.line}{because}" for finding in ending))


def save(run: Run, *, prune: bool = True) -> None:
    """Write a checkpoint of the last finished step, unless it is there already. prune: remove old ones.

    Raises NotSaved.
    """
    if run.saved_step == run.state.step:
        return
    check_replicas(run.backend, run.world)
    run.world.first(lambda: write_checkpoint(run, prune=prune))
    run.saved_step = run.state.step


def write_checkpoint(run: Run, *, prune: bool = True) -> None:
    """As `save`, in this process alone."""
    run.folder.sync()
    keep = run.config.training.keep_checkpoints if prune else 0
    run.state.ahead = run.pipeline.ahead(run.state.step)

    def save_policies(folder: Path) -> None:
        run.backend.save(folder)
        run.pipeline.save(folder, run.state.step)

    try:
        extra = beside(run.config, run.folder)
        checkpoint.write(run.folder.path, run.state, save_policies, keep=keep, beside=extra)
    except OSError as error:
        raise NotSaved(
            f"the checkpoint of step {run.state.step} could not be written: {error.strerror} ({run.folder.path}). "
            f"Earlier checkpoints are as they were; make room. {resume_hint(run.folder.path)}"
        ) from error
    except ServerLost as error:
        raise NotSaved(
            f"{error}\nIt holds no state of step {run.state.step}: the last checkpoint is that of step "
            f"{run.saved_step}. {resume_hint(run.folder.path)}"
        ) from error
