"""The runs of a campaign: every condition with every seed, each an ordinary Config. Pure; nothing is run here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from retrain.config.build import build
from retrain.config.schema import Config
from retrain.config.sections import CampaignConfig, ConditionConfig
from retrain.types import ConfigError

# The five-step ablation that a campaign without conditions runs.
ABLATION = tuple(
    ConditionConfig(advantage_mode=advantage, transform_mode=transform)
    for advantage, transform in (
        ("grpo", "none"),
        ("maxrl", "none"),
        ("maxrl", "gtpo"),
        ("maxrl", "gtpo_hicra"),
        ("maxrl", "gtpo_sepa"),
    )
)

# What the campaign itself decides for each run, so that a condition may not.
DECIDED = ("training.seed", "training.max_steps", "backend.devices", "logging.log_dir", "resume.from")
DECIDED_SECTIONS = ("campaign", "squeeze")
# Of `[squeeze]`, what belongs to a run's own training; the rest is about the campaign's first adapter.
SQUEEZE_OF_RUNS = ("at_steps", "to_ranks")

RunKind = Literal["train", "campaign", "squeeze"]


@dataclass(frozen=True)
class Run:
    """One run of a campaign. name: `<condition>_s<seed>`, which is also its folder."""

    name: str
    condition: str
    seed: int
    config: Config


def run_kind(config: Config) -> RunKind:
    """What `retrain CONFIG` does: a campaign, a standalone squeeze, or a training run."""
    if config.campaign is not None:
        return "campaign"
    squeeze = config.squeeze
    alone = squeeze is not None and squeeze.adapter_path and "training" not in config.model_fields_set
    return "squeeze" if alone else "train"


def run_matrix(config: Config) -> tuple[Run, ...]:
    """The runs of `[campaign]`, seeds innermost; () without one. Raises ConfigError that names a wrong condition."""
    if config.campaign is None:
        return ()
    named = [(_name(config, condition), condition) for condition in config.campaign.conditions or ABLATION]
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'campaign.conditions: two are named "{name}"; give one of them another name')
    return tuple(
        Run(f"{name}_s{seed}", name, seed, _run_config(config, config.campaign, condition, name, seed))
        for name, condition in named
        for seed in config.campaign.seeds
    )


def _name(config: Config, condition: ConditionConfig) -> str:
    modes = {"advantage_mode": condition.advantage_mode, "transform_mode": condition.transform_mode}
    own = {key: mode for key, mode in modes.items() if mode is not None}
    return condition.name or config.algorithm.model_copy(update=own).condition


def _run_config(config: Config, campaign: CampaignConfig, condition: ConditionConfig, name: str, seed: int) -> Config:
    where = f'campaign condition "{name}"'
    for path in condition.overrides:
        section, _, key = path.partition(".")
        of_run = section == "squeeze" and key in SQUEEZE_OF_RUNS
        if path in DECIDED or (section in DECIDED_SECTIONS and not of_run):
            raise ConfigError(f"{where}: {path} is decided by the campaign; remove it from the overrides")
    modes = {
        "algorithm.advantage_mode": condition.advantage_mode,
        "algorithm.transform_mode": condition.transform_mode,
    }
    overrides: dict[str, Any] = {path: mode for path, mode in modes.items() if mode is not None}
    overrides |= {"training.seed": seed, "training.max_steps": campaign.max_steps or config.training.max_steps}
    # Several devices are shared out: each run has one.
    overrides["backend.devices"] = config.backend.devices.split(",")[0]
    if config.squeeze is not None:
        set_keys = config.squeeze.model_fields_set.intersection(SQUEEZE_OF_RUNS)
        overrides |= {f"squeeze.{key}": getattr(config.squeeze, key) for key in set_keys}
    # Only what was set: a default may depend on another key, which the condition may change.
    base = config.model_dump(by_alias=True, exclude_unset=True, exclude=set(DECIDED_SECTIONS))
    try:
        return build(base, overrides | condition.overrides)
    except ConfigError as exc:
        raise ConfigError("\n".join(f"{where}: {line}" for line in str(exc).splitlines())) from None
