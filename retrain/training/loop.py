"""The loop: publish, prompts, completions, rewards, advantages, one training step, records, checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from retrain.algorithm.sepa import SepaController
from retrain.backend import Backend
from retrain.inference import Engine
from retrain.training import checkpoint
from retrain.training.batching import Credited, Detector, credit
from retrain.training.checkpoint import TrainerState
from retrain.training.collect import Collected, Collector
from retrain.training.evaluate import Evaluation
from retrain.training.folder import GENERATIONS, METRICS, RunFolder
from retrain.training.interrupt import Interrupts
from retrain.training.metrics import RUNNING_STEPS, STAGES, RewardSummary, generation_rows, step_metrics, summarize
from retrain.training.stopwatch import Stopwatch
from retrain.types import RetrainError, StepResult

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


@dataclass
class Run:
    """The parts of a running experiment, put together by `retrain.training.run.open_run`."""

    config: Config
    state: TrainerState
    folder: RunFolder
    backend: Backend
    engine: Engine
    collector: Collector
    detect: Detector
    sepa: SepaController
    interrupts: Interrupts
    observer: Observer
    evaluate: Callable[[], Evaluation]
    saved_step: int | None = None


def run_steps(run: Run) -> None:
    """Train until max_steps. Raises Interrupted, with the run's state at a finished step, when a signal came."""
    while run.state.step < run.config.training.max_steps:
        watch = Stopwatch()
        with run.interrupts.anywhere():
            with watch("sync"):
                run.engine.publish(run.state.policy_version)
            got = run.collector.collect(run.state.step, run.state.prompts_used, run.state.policy_version, watch)
        summary = summarize(got.sampled)
        sepa_lambda = run.sepa.value(run.state.step, summary.correct_rate)
        credited = credit(
            got.groups,
            run.config.algorithm,
            max_tokens=run.config.training.max_tokens,
            detect=run.detect,
            sepa_lambda=sepa_lambda,
        )
        with watch("train"):
            learned = _learn(run, credited)
        _advance(run.state, got, summary)
        _record(run, got, summary, credited, learned, watch)
        if run.state.step % run.config.training.save_every == 0:
            save(run)


def _learn(run: Run, credited: Credited) -> StepResult:
    """One training step, and with it a new policy version; nothing where no group carried a gradient."""
    if not credited.batch.rollouts:
        return StepResult()
    learned = run.backend.step(credited.batch, run.state.step)
    run.state.policy_version += 1
    run.sepa.observe(learned.metrics["exec_uncertainty_var"])
    return learned


def _advance(state: TrainerState, got: Collected, summary: RewardSummary) -> None:
    state.step += 1
    state.prompts_used = got.prompts_used
    state.completion_tokens += summary.completion_tokens
    if summary.correct_rate is not None:
        state.recent_correct = [*state.recent_correct, summary.correct_rate][-RUNNING_STEPS:]


def _record(
    run: Run, got: Collected, summary: RewardSummary, credited: Credited, learned: StepResult, watch: Stopwatch
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
        batch_size=len(got.sampled),
        group_size=config.training.group_size,
        **got.figures,
        eval_correct_rate=evaluation.pass_at[1].value if evaluation and evaluation.pass_at else None,
        **{f"{stage}_time_s": watch.stages.get(stage, 0.0) for stage in STAGES},
        step_time_s=step_time,
        tokens_per_s=summary.completion_tokens / step_time,
        peak_memory_bytes=run.backend.peak_memory_bytes(),
    )
    uncertainty = dict(zip(credited.members, learned.uncertainty, strict=True))
    # Groups that dynamic sampling set aside were sampled and scored as well, but have no advantage.
    advantages_PG = credited.advantages_PG + [[None] * len(group.completions) for group in got.uniform]
    rows = generation_rows(state.step, got.sampled, advantages_PG, uncertainty)
    run.folder.append(METRICS, [metrics])
    run.folder.append(GENERATIONS, rows)
    run.observer.on_step(metrics, rows)


def save(run: Run) -> None:
    """Write a checkpoint of the last finished step, unless it is there already."""
    if run.saved_step == run.state.step:
        return
    run.state.sepa = run.sepa.state()
    run.folder.sync()
    keep = run.config.training.keep_checkpoints
    try:
        checkpoint.write(run.folder.path, run.state, run.backend.save, keep=keep)
    except OSError as error:
        raise RetrainError(
            f"the checkpoint of step {run.state.step} could not be written: {error.strerror} ({run.folder.path}). "
            "Earlier checkpoints are as they were; make room and resume"
        ) from error
    run.saved_step = run.state.step
