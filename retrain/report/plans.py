"""Which charts a page has, over the steps of a run: a table of metrics.jsonl's keys."""

from __future__ import annotations

from dataclasses import dataclass

from retrain.training.metrics import RUNNING_STEPS

REWARD_PART = "reward_"
NO_PARTS = ("reward_errors", "reward_time_s")


@dataclass(frozen=True)
class Plan:
    """A chart over steps. keys: (key of metrics.jsonl, what its line is called). unit: "%" for shares, else ""."""

    section: str
    title: str
    keys: tuple[tuple[str, str], ...]
    unit: str = ""
    note: str = ""


PLANS = (
    Plan(
        "learning",
        "Correct rate",
        (("running_correct_rate", "correct rate"),),
        "%",
        f"Share of completions with a reward above 0.5, mean of the last {RUNNING_STEPS} steps.",
    ),
    Plan("learning", "Mean reward", (("mean_reward", "mean reward"),)),
    Plan("learning", "Held-out correct rate", (("eval_correct_rate", "held-out"),), "%", "As [eval] measures it."),
    Plan(
        "credit",
        "Entropy (nats)",
        (("exec_entropy_mean", "execution tokens"), ("plan_entropy_mean", "planning tokens")),
        note="Mean entropy of the next-token distribution, apart for tokens that plan and tokens that execute.",
    ),
    Plan("credit", "Tokens that plan", (("planning_fraction", "planning"),), "%"),
    Plan(
        "credit",
        "SEPA lambda",
        (("sepa_lambda", "lambda"),),
        note="How far the uncertainty of execution tokens is pooled: 0 not at all, 1 wholly.",
    ),
    Plan("training", "Loss", (("loss", "loss"),)),
    Plan("training", "Gradient norm", (("grad_norm", "gradient norm"),)),
    Plan(
        "training",
        "Sampler against trainer (nats)",
        (("logprob_gap_mean", "mean gap"), ("logprob_gap_max", "largest gap")),
        note="Distance of their log-probabilities of the same token.",
    ),
    Plan("training", "Completions cut at max_tokens", (("max_token_hit_rate", "cut"),), "%"),
    Plan(
        "training",
        "Groups without a gradient",
        (("groups_all_correct", "all correct"), ("groups_all_wrong", "all wrong")),
    ),
    Plan("training", "Adapter rank", (("lora_rank", "rank"),)),
    Plan("speed", "Tokens per second", (("tokens_per_s", "tokens per second"),)),
    Plan("speed", "Prompts per step", (("batch_size", "prompts"),)),
)
KEYS = frozenset(key for plan in PLANS for key, _ in plan.keys)
# Not worth a chart where they never change.
CONSTANT = ("batch_size", "lora_rank", "sepa_lambda")


def is_shown(key: str) -> bool:
    """Whether a key of metrics.jsonl has a curve on the page."""
    return key in KEYS or is_part(key)


def is_part(key: str) -> bool:
    """Whether a key is the mean of a part of the reward."""
    return key.startswith(REWARD_PART) and key not in NO_PARTS
