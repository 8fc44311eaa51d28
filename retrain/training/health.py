"""Says when a run is not learning, with the number and what to change. docs/training.md lists the warnings.

Each check is a pure function of the last steps. What they remember is a JSON-able dict that the checkpoint keeps, and
they look at no clock: a resumed run says what an uninterrupted one would have said. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrain.config import without_effect
from retrain.types import RetrainError

if TYPE_CHECKING:
    from retrain.config import Config

# Steps that a check looks back over: enough that one small batch decides nothing, few enough to be early.
WINDOW = 5
# Steps without a finding before it is said again: less would repeat one that comes and goes.
QUIET = 10
# Completions that a share is taken of: of fewer, more than half are cut by chance too easily.
COMPLETIONS = 16
# Share of completions cut at max_tokens: most rewards are then of answers that were never given.
TRUNCATED = 0.5
# Rise of the mean log-prob gap against the first steps, and the gap in nats below which none matters: ratios are then
# within 2% of 1, as with a sampler in bfloat16.
GAP_RISE, GAP_FLOOR = 2.0, 0.02
# Mean gap in nats that is too large from the first step on: probabilities are 10% off, as at a wrong temperature.
GAP_LARGE = 0.1
# Share of the first steps' entropy below which a policy hardly explores. A run that learns comes down to a fifth
# (configs/quickstart.toml), and one that has learned may go lower: most of its answers are right.
ENTROPY_LEFT, LEARNED = 0.1, 0.9
# Skipped steps in a row that end the run: one batch may be bad luck, three are the policy.
SKIPPED_IN_A_ROW = 3

_NOTHING = {"recent": [], "trained": [], "first": [], "best": 0.0, "skipped": 0, "quiet": {}}

Row = Mapping[str, Any]
KEPT = (
    "batch_size", "completion_tokens", "entropy_mean", "grad_norm", "group_size", "groups_all_correct",
    "groups_all_wrong", "logprob_gap_mean", "max_token_hit_rate", "mean_reward", "num_datums", "planning_fraction",
)  # fmt: skip


class NotLearning(RetrainError):
    """A warning under `training.strict`, or one that ends every run."""


@dataclass(frozen=True)
class Finding:
    """name: as in the `warnings` of metrics.jsonl. line: what a person reads. fatal: it ends the run."""

    name: str
    line: str
    fatal: bool = False


@dataclass(frozen=True)
class Report:
    """holding: what is wrong at this step; said: those of it to say now. memory: for the next step."""

    holding: list[Finding]
    said: list[Finding]
    memory: dict[str, Any]


@dataclass(frozen=True)
class _Past:
    """row: this step's metrics. recent: the last WINDOW steps, this one last; trained: the last WINDOW of those that
    made an update; first: the first WINDOW of these. best: the highest correct rate. skipped: steps skipped in a row.
    """

    config: Config
    row: Row
    recent: Sequence[Row]
    trained: Sequence[Row]
    first: Sequence[Row]
    best: float
    skipped: int

    def throughout(self, holds: Callable[[Row], bool], rows: Sequence[Row]) -> bool:
        return len(rows) == WINDOW and all(map(holds, rows))


def at_load(config: Config) -> list[str]:
    """What is wrong with a config that is allowed, a line each."""
    lines = without_effect(config)
    if config.training.group_size == 1:
        lines.append("training.group_size = 1: a group of one has nothing to compare with, every advantage is 0")
    ahead, alone = config.training.max_staleness, config.inference.engine == "pytorch" and not config.backend.is_split
    if ahead and alone:
        lines.append(
            f"training.max_staleness = {ahead}: sampling has no device or server of its own, takes turns with the "
            'training and saves no time; name two devices (backend.devices = "gpu:0,gpu:1", or "cpu,cpu"), or use 0'
        )
    if config.training.lr == 0:
        lines.append("training.lr = 0: no update changes anything")
    return lines


def examine(config: Config, row: Row, memory: Mapping[str, Any]) -> Report:
    """Look at a finished step. row: its line of metrics.jsonl. memory: of the step before, {} at first."""
    kept = {key: row[key] for key in KEPT}
    was: dict[str, Any] = _NOTHING | dict(memory)
    trained = [kept] if row["loss"] is not None else []
    past = _Past(
        config,
        row,
        recent=[*was["recent"], kept][-WINDOW:],
        trained=[*was["trained"], *trained][-WINDOW:],
        first=[*was["first"], *trained][:WINDOW],
        best=max(was["best"], row["correct_rate"] or 0.0),
        # A step without anything to train on is no sign of recovery.
        skipped=was["skipped"] + 1 if row["skipped"] else 0 if trained else was["skipped"],
    )
    holding = [finding for check in CHECKS if (finding := check(past)) is not None]
    names = [finding.name for finding in holding]
    quiet = {name: 0 if name in names else steps + 1 for name, steps in was["quiet"].items()}
    said = [finding for finding in holding if finding.name not in quiet]
    remembered = {name: steps for name, steps in quiet.items() if steps < QUIET} | dict.fromkeys(names, 0)
    fields = {name: getattr(past, name) for name in ("recent", "trained", "first", "best", "skipped")}
    return Report(holding, said, fields | {"quiet": remembered})


def _not_finite(past: _Past) -> Finding | None:
    what, step = past.row["skipped"], past.row["step"]
    if not what:
        return None
    remedy = (
        "Look at the inference engine, which reported them"
        if what.startswith("sampler")
        else "Lower training.lr or loss.clip_high, or train in fp32"
    )
    return Finding(
        "not_finite",
        f"step {step} was skipped, {past.skipped} in a row: the {what} of the completions in nonfinite.jsonl came out "
        f"as no finite number. {remedy}",
        fatal=past.skipped >= SKIPPED_IN_A_ROW,
    )


def _truncated(past: _Past) -> Finding | None:
    counts = [(row["batch_size"] * row["group_size"], row["max_token_hit_rate"]) for row in past.recent]
    total = sum(count for count, _ in counts)
    share = sum(count * rate for count, rate in counts) / total
    if share <= TRUNCATED or (total < COMPLETIONS and len(counts) < WINDOW):
        return None
    limit = past.config.training.max_tokens
    return Finding(
        "truncated",
        f"{share:.0%} of the completions of {_last(counts)} were cut at training.max_tokens = {limit}: raise it, or "
        "ask for shorter answers (algorithm.overlong_buffer)",
    )


def _masked(past: _Past) -> Finding | None:
    if past.row["completion_tokens"]:
        return None
    return Finding(
        "masked",
        f"step {past.row['step']} has no token that the model sampled, so nothing to train on: the episodes of the "
        "environment end before the model's first turn",
    )


def _reward_errors(past: _Past) -> Finding | None:
    row = past.row
    if row["mean_reward"] is not None:
        return None
    return Finding(
        "reward_errors",
        f"not one of the {row['reward_errors']} rewards of step {row['step']} could be computed: `error` in "
        "generations.jsonl says why; reward.max_error_rate ends a run for it",
    )


def _uniform(past: _Past) -> Finding | None:
    if not past.throughout(lambda row: _sampled(row) and _is_uniform(row), past.recent):
        return None
    right, wrong = (sum(row[f"groups_all_{which}"] for row in past.recent) for which in ("correct", "wrong"))
    remedy = (
        "take harder examples, or sample on for groups that differ (algorithm.dynamic_sampling)"
        if right > wrong
        else "take easier examples, a reward that gives partial credit, or a larger training.group_size"
    )
    return Finding(
        "uniform_groups",
        f"no group of {_last(past.recent)} had two different rewards ({right} groups all right, {wrong} all wrong), so "
        f"there is nothing to learn from: {remedy}",
    )


def _no_gradient(past: _Past) -> Finding | None:
    if not past.throughout(lambda row: row["grad_norm"] == 0 and not _is_uniform(row), past.trained):
        return None
    masks = past.config.loss.mismatch_correction == "mask"
    suspect = 'loss.mismatch_correction = "mask" drops every token' if masks else "the advantages may all be 0"
    return Finding(
        "no_gradient",
        f"the gradient of {_last(past.trained)} with an update is exactly 0: {suspect}, or "
        "algorithm.advantage_mode and transform_mode leave no token any credit",
    )


def _planning(past: _Past) -> Finding | None:
    config, mode = past.config, past.config.algorithm.transform_mode
    pools, amplifies = _pools(config), mode.endswith("hicra") and config.hicra.alpha != 0
    fractions = {row["planning_fraction"] for row in past.trained}
    if "." in mode or not (pools or amplifies) or len(past.trained) < WINDOW or fractions not in ({0.0}, {1.0}):
        return None
    which = "no token" if fractions == {0.0} else "every token"
    change = "logging.strategic_grams" if config.planning.detector == "regex" else "planning.threshold"
    return Finding(
        "planning",
        f"{which} of {_last(past.trained)} counts as planning (planning_fraction {fractions.pop():g}), which "
        f'algorithm.transform_mode = "{mode}" tells apart: change {change} or planning.detector, or use "gtpo"',
    )


def _gate(past: _Past) -> Finding | None:
    config, row = past.config, past.row
    if not _pools(config) or row["sepa_gate_open"] or row["step"] < max(WINDOW, config.training.max_steps / 2):
        return None
    return Finding(
        "sepa_gate",
        f"the SEPA gate is still shut at step {row['step']} of {config.training.max_steps}: the best batch was "
        f"{past.best:.0%} right, sepa.correct_rate_gate = {config.sepa.correct_rate_gate:g}. Lower it, or take easier "
        "examples",
    )


def _gap(past: _Past) -> Finding | None:
    now, first = _mean("logprob_gap_mean", past.trained), _mean("logprob_gap_mean", past.first)
    if now is None or first is None or not (now > GAP_LARGE or (now > GAP_FLOOR and now > GAP_RISE * first)):
        return None
    dropout, ahead = past.config.lora.dropout, past.config.training.max_staleness
    if dropout:
        remedy = f"lora.dropout = {dropout:g} trains another policy than the one that samples; set it to 0"
    elif ahead:
        remedy = f"so far the policy moves while it is ahead; lower training.lr or training.max_staleness (now {ahead})"
    else:
        remedy = (
            "the sampler should serve this policy, at training.temperature and in the format it trains in; "
            'loss.old_logprobs = "recompute" corrects for the rest'
        )
    return Finding(
        "logprob_gap",
        f"sampler and trainer disagree by {now:.2g} nats a token over {_last(past.trained)} ({first:.2g} in the "
        f"first): {remedy}",
    )


def _entropy(past: _Past) -> Finding | None:
    rate = past.row["running_correct_rate"]
    if len(past.trained) < WINDOW or (rate is not None and rate >= LEARNED):
        return None
    now, first = _mean("entropy_mean", past.trained), _mean("entropy_mean", past.first)
    if now is None or first is None or now >= ENTROPY_LEFT * first:
        return None
    return Finding(
        "entropy_collapse",
        f"entropy has fallen to {now:.2g} nats a token over {_last(past.trained)}, {now / first:.1%} of the "
        f"{first:.2g} it began with, at a correct rate of {rate or 0:.0%}: the policy hardly explores. Lower "
        "training.lr, or set loss.entropy_coef or loss.kl_coef",
    )


CHECKS: tuple[Callable[[_Past], Finding | None], ...] = (
    _not_finite,
    _truncated,
    _masked,
    _reward_errors,
    _uniform,
    _no_gradient,
    _planning,
    _gate,
    _gap,
    _entropy,
)


def _sampled(row: Row) -> bool:
    """Whether there was anything to compare: no finding of its own explains the step."""
    return row["completion_tokens"] > 0 and row["mean_reward"] is not None


def _is_uniform(row: Row) -> bool:
    """Whether no group gave a gradient: none was trained on or, without `skip_uniform_groups`, all were in vain."""
    alike = row["groups_all_correct"] + row["groups_all_wrong"] == row["batch_size"]
    return row["num_datums"] == 0 or (alike and row["grad_norm"] == 0)


def _pools(config: Config) -> bool:
    mode = config.algorithm.transform_mode
    return "." not in mode and "sepa" in mode and config.gtpo.beta != 0


def _mean(key: str, rows: Sequence[Row]) -> float | None:
    """None where there is nothing to average: a backend may not report a figure."""
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) / len(known) if known else None


def _last(rows: Sequence[Any]) -> str:
    return "the last step" if len(rows) == 1 else f"the last {len(rows)} steps"
