"""Putting a run together from its config, and taking it to its end."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain import data, planning, reward
from retrain.algorithm.sepa import SepaController
from retrain.backend import open_backend
from retrain.config import KEYS, check_available, dump_toml, load_config, value_of, without_effect
from retrain.inference import open_engine
from retrain.training import checkpoint, durable
from retrain.training.checkpoint import Checkpoint, TrainerState
from retrain.training.collect import Collector
from retrain.training.evaluate import Evaluation, evaluate
from retrain.training.folder import CONFIG, FINAL, METRICS, RunFolder, copy_records, holds_run
from retrain.training.interrupt import Interrupted, Interrupts
from retrain.training.loop import Observer, Run, run_steps, save
from retrain.training.metadata import Metadata
from retrain.training.prompts import encode_prompts
from retrain.training.records import last_row
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
    "backend.devices",
    "inference.max_logprob_gap",
}
CHANGEABLE_SECTIONS = {"logging", "resume", "eval"}


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
    start = _find_start(config, log_dir, observer)
    if start is not None and start.state.step >= config.training.max_steps and _is_final(log_dir, start):
        observer.say(f"{log_dir} is finished: it has {start.state.step} steps. Raise --max-steps to go on")
        return TrainResult(log_dir, start.state.step, last_row(log_dir / METRICS))
    with Interrupts() as interrupts:
        with interrupts.anywhere():
            run = open_run(config, start, interrupts, observer)
        return _finish(run, _begin(run, start))


def open_run(config: Config, start: Checkpoint | None, interrupts: Interrupts, observer: Observer) -> Run:
    """Load everything, then take the run folder: what is wrong with the input shows before anything is written."""
    log_dir = Path(config.logging.log_dir)
    for line in without_effect(config):
        observer.say(f"no effect: {line}")
    if config.training.group_size == 1:
        observer.say("training.group_size = 1: a group of one has nothing to compare with, every advantage is 0")
    state = start.state if start else TrainerState(seed=_seed(config))
    dataset = data.load(config.data, max_examples=config.training.max_examples)
    if config.eval.every and not dataset.eval:
        raise ConfigError("eval.every needs held-out examples: set data.eval_fraction, such as 0.1")
    backend = open_backend(config, seed=state.seed, say=observer.say)
    limits = {
        "context": backend.context,
        "max_tokens": config.training.max_tokens,
        "max_prompt_tokens": config.training.max_prompt_tokens,
    }
    examples, prompt_tokens = encode_prompts(dataset.train, backend.tokenizer, **limits, say=observer.say)
    engine = open_engine(config.inference, backend)
    engine.publish(state.policy_version)
    scorer = reward.open_scorer(config.reward.type)
    held_out = dataset.eval if config.eval.every else ()
    eval_examples, eval_tokens = encode_prompts(held_out, backend.tokenizer, **limits, say=observer.say)

    def evaluate_now() -> Evaluation:
        return evaluate_held_out(config, engine, scorer, eval_examples, eval_tokens, seed=state.seed)

    if start:
        backend.load(start.folder)
    detect = planning.open_detector(config.planning.detector, backend.tokenizer, grams=config.logging.strategic_grams)
    section = {key: getattr(config.sepa, key) for key in type(config.sepa).model_fields}
    return Run(
        config=config,
        state=state,
        folder=RunFolder(log_dir),
        backend=backend,
        engine=engine,
        collector=Collector(
            examples, prompt_tokens, engine, scorer, state.seed, config.training, config.algorithm, config.data
        ),
        detect=detect,
        sepa=SepaController.from_state(state.sepa, **section) if state.sepa else SepaController(**section),
        interrupts=interrupts,
        observer=observer,
        evaluate=evaluate_now,
    )


def _begin(run: Run, start: Checkpoint | None) -> Metadata:
    """First writes: the checkpoint of step 0 or the cut back to the one resumed from, then config and metadata."""
    config, log_dir = run.config, run.folder.path
    resumed = None
    if start is None:
        # With this first checkpoint a run can go on from the very beginning, wherever it is killed.
        save(run)
    else:
        copy_records(start.log_dir, log_dir, up_to=start.state.step)
        checkpoint.discard_after(log_dir, start.state.step)
        resumed = {"from": str(start.folder), "changed": _changed_keys(config, start)}
        run.saved_step = start.state.step if _same(start.log_dir, log_dir) else None
        save(run)
    resolved = config.model_copy(update={"resume": type(config.resume)()})
    durable.write_bytes(log_dir / CONFIG, dump_toml(resolved).encode())
    facts = {
        "condition": f"{config.algorithm.advantage_mode}+{config.algorithm.transform_mode}",
        "seed": run.state.seed,
        "model": config.model.model,
        **run.backend.describe(),
        "base_sha256": run.backend.base_digest(),
        "uncertainty": run.backend.uncertainty,
        "examples": len(run.collector.examples),
    }
    return Metadata(log_dir, facts, from_step=run.state.step, resumed=resumed)


def _finish(run: Run, metadata: Metadata) -> TrainResult:
    log_dir, status = run.folder.path, "failed"
    try:
        run_steps(run)
        save(run)
        _write_final(run)
        if run.backend.base_digest() != metadata.content["base_sha256"]:
            raise RetrainError("the base model's weights changed during the run; so its results are void")
        status = "finished"
    except Interrupted:
        save(run)
        status = "interrupted"
        raise Interrupted(f"stopped after step {run.state.step}; checkpoint written. {resume_hint(log_dir)}") from None
    except OSError as error:
        raise RetrainError(
            f"writing to {log_dir} failed: {error.strerror}. The last checkpoint is complete. {resume_hint(log_dir)}"
        ) from error
    finally:
        run.collector.scorer.close()
        run.engine.close()
        run.folder.close()
        # A disk that is full must not hide the error that says so.
        with suppress(OSError):
            metadata.close(step=run.state.step, status=status)
    return TrainResult(log_dir, run.state.step, last_row(log_dir / METRICS))


def resume_hint(log_dir: Path) -> str:
    return f"Go on with: retrain {log_dir / CONFIG} --resume {log_dir}"


def evaluate_adapter(config: Config, adapter: Path | None, *, say: Callable[[str], None]) -> Evaluation:
    """`[eval]` on the held-out examples of `config`, with the adapter in a folder or (None) the base model alone.

    Raises ConfigError where nothing is held out, RetrainError where the adapter is not for this model.
    """
    seed = max(config.training.seed, 0)
    dataset = data.load(config.data)
    if not dataset.eval:
        raise ConfigError("there are no held-out examples to evaluate on: set data.eval_fraction, such as 0.1")
    backend = open_backend(_shaped_like(config, adapter), seed=seed, say=say)
    if adapter:
        backend.load_adapter(adapter)
    examples, prompt_tokens = encode_prompts(
        dataset.eval,
        backend.tokenizer,
        context=backend.context,
        max_tokens=config.training.max_tokens,
        max_prompt_tokens=config.training.max_prompt_tokens,
        say=say,
    )
    scorer = reward.open_scorer(config.reward.type)
    try:
        return evaluate_held_out(
            config, open_engine(config.inference, backend), scorer, examples, prompt_tokens, seed=seed
        )
    finally:
        scorer.close()


def _shaped_like(config: Config, adapter: Path | None) -> Config:
    """The config with the LoRA shape of the adapter: one of another rank can be evaluated as well."""
    if adapter is None:
        return config
    shape = json.loads((adapter / "adapter_config.json").read_bytes())
    lora = {"alpha": shape["lora_alpha"], "use_rslora": shape["use_rslora"]}
    lora["target_modules"] = tuple(sorted(shape["target_modules"]))
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"lora_rank": shape["r"]}),
            "lora": config.lora.model_copy(update=lora),
        }
    )


def evaluate_held_out(
    config: Config, engine: Any, scorer: reward.Scorer, examples: list, prompt_tokens: list, *, seed: int
) -> Evaluation:
    """`[eval]` on at most `eval.examples` held-out examples, chosen by content: always the same ones."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].id)[: config.eval.examples]
    return evaluate(
        engine,
        scorer,
        [examples[i] for i in order],
        [prompt_tokens[i] for i in order],
        samples=config.eval.samples,
        temperature=config.eval.temperature,
        max_tokens=config.training.max_tokens,
        seed=seed,
        prompts_at_once=max(1, config.training.batch_size * config.training.group_size // config.eval.samples),
    )


def _find_start(config: Config, log_dir: Path, observer: Observer) -> Checkpoint | None:
    source = config.resume.from_
    start = checkpoint.find(Path(source), observer.say) if source else None
    if start is not None:
        refused = [key for key in _changed_keys(config, start) if not _changeable(key)]
        if refused:
            raise ConfigError(
                f"the run in {start.log_dir} was made with other values of {', '.join(refused)}; resumed with these it "
                f"would be neither run. Use its own config: retrain {start.log_dir / CONFIG} --resume {source}"
            )
    if holds_run(log_dir) and (start is None or not _same(start.log_dir, log_dir)):
        raise ConfigError(
            f"logging.log_dir = {log_dir} already holds a run, which is never written over. {resume_hint(log_dir)}, "
            "or give another --log-dir"
        )
    return start


def _changed_keys(config: Config, start: Checkpoint) -> dict[str, list[Any]]:
    """`section.key` -> [value of the run that is resumed, value now]."""
    path = start.log_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"resume.from = {start.log_dir}: its {CONFIG} is missing, so the run cannot be compared")
    was = load_config(path)
    values = {name: [value_of(was, key), value_of(config, key)] for name, key in KEYS.items()}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1] and not name.startswith("resume.")}


def _changeable(key: str) -> bool:
    return key in CHANGEABLE or key.partition(".")[0] in CHANGEABLE_SECTIONS


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _is_final(log_dir: Path, start: Checkpoint) -> bool:
    return _same(start.log_dir, log_dir) and (log_dir / FINAL).is_dir()


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
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    durable.sync_folder(run.folder.path)
