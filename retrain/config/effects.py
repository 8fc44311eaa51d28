"""The one table of settings that do nothing with the modes chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from retrain.config.campaign import SQUEEZE_OF_RUNS, run_kind
from retrain.config.experiments import BackpressureConfig, CampaignConfig
from retrain.config.fields import source_kind
from retrain.config.rewards import RewardKeys, RewardPart
from retrain.config.schema import Config, changed
from retrain.config.sections import InferenceConfig
from retrain.config.show import show_key


def without_effect(config: Config) -> list[str]:
    """One line, with the reason, for each key that is set off its default and changes nothing."""
    return [*_lines(config, _table(config)), *_idle_in_parts(config.reward.parts)]


def without_effect_in_campaign(config: Config, runs: Sequence[Config]) -> list[str]:
    """The same of a campaign: what changes nothing in any of its runs, and what it replaces by its own."""
    assert config.campaign is not None
    idle = [{line.partition(" = ")[0]: line for line in without_effect(run)} for run in runs]
    everywhere = [line for path, line in idle[0].items() if all(path in other for other in idle)]
    return [*_lines(config, _campaign_table(config, config.campaign)), *everywhere]


def _lines(config: Config, table: Iterator[tuple[bool, str, str]]) -> list[str]:
    idle = [(pattern, reason) for holds, pattern, reason in table if holds]
    lines = []
    for path, value in changed(config).items():
        reason = next((reason for pattern, reason in idle if fnmatchcase(path, pattern)), None)
        if reason is not None:
            lines.append(f"{show_key(path, value)}: no effect {reason}")
    return lines


def _campaign_table(config: Config, campaign: CampaignConfig) -> Iterator[tuple[bool, str, str]]:
    yield True, "training.seed", "in a campaign, which has seeds of its own: campaign.seeds"
    yield (
        campaign.max_steps not in (0, config.training.max_steps),
        "training.max_steps",
        f"with campaign.max_steps = {campaign.max_steps}",
    )
    for key in ("run_name", "group"):
        yield True, f"logging.wandb_{key}", "in a campaign, which names its runs and groups"
    for key in ("max_workers", "stagger_seconds"):
        yield not campaign.parallel, f"campaign.{key}", "without campaign.parallel"
    yield config.squeeze is not None, "squeeze.adapter_path", "in a campaign: it is that of the first finished run"


def _idle_reward_keys(keys: RewardKeys) -> list[str]:
    """Patterns of the keys that a reward of this type does not look at."""
    users = {"judge_*": ("judge",), "custom_*": ("custom",), "timeout_s": ("math", "custom")}
    return [pattern for pattern, types in users.items() if keys.type not in types]


def _idle_in_parts(parts: tuple[RewardPart, ...]) -> Iterator[str]:
    for i, part in enumerate(parts):
        idle = _idle_reward_keys(part)
        for name, field in RewardPart.model_fields.items():
            value = getattr(part, name)
            if value != field.default and any(fnmatchcase(name, pattern) for pattern in idle):
                yield f'{show_key(f"reward.parts[{i}].{name}", value)}: no effect with type = "{part.type}"'


def _table(config: Config) -> Iterator[tuple[bool, str, str]]:
    """(holds, keys without effect, reason); the first rule that holds for a key gives the reason."""
    transform, loss, reward = config.algorithm.transform_mode, config.loss, config.reward
    plugin = "." in transform
    with_transform = f'with algorithm.transform_mode = "{transform}"'
    yield plugin or transform == "none", "gtpo.beta", with_transform
    yield plugin or not transform.endswith("hicra"), "hicra.alpha", with_transform
    yield plugin or "sepa" not in transform, "sepa.*", with_transform
    for key in ("ema_decay", "variance_threshold", "warmup"):
        yield config.sepa.schedule != "auto", f"sepa.{key}", 'with sepa.schedule = "linear"'
    yield config.sepa.steps == 0, "sepa.delay_steps", "with sepa.steps = 0"
    yield not config.algorithm.dynamic_sampling, "algorithm.max_resample_rounds", "without algorithm.dynamic_sampling"

    yield loss.kind == "importance_sampling", "loss.clip_*", 'with loss.kind = "importance_sampling"'
    yield loss.kind != "ppo", "loss.dual_clip", f'with loss.kind = "{loss.kind}"'
    yield loss.kl_coef == 0, "loss.kl_estimator", "with loss.kl_coef = 0"
    yield loss.mismatch_correction == "none", "loss.mismatch_cap", "without loss.mismatch_correction"

    yield config.planning.detector == "regex", "planning.model", 'with planning.detector = "regex"'
    yield config.planning.detector == "regex", "planning.threshold", 'with planning.detector = "regex"'
    yield config.planning.detector == "semantic", "logging.strategic_grams", 'with planning.detector = "semantic"'
    for key in ("type", "judge_*", "custom_*", "timeout_s"):
        yield bool(reward.parts), f"reward.{key}", "with reward.parts, which have such keys of their own"
    for key in _idle_reward_keys(reward):
        own = source_kind(config.data.source) == "reasoning_gym"  # its tasks' scorers have a time limit too
        yield not (own and key == "timeout_s"), f"reward.{key}", f'with reward.type = "{reward.type}"'
    yield from _backpressure_table(config.backpressure)
    yield not config.logging.wandb_project, "logging.wandb_*", "without logging.wandb_project"
    if config.eval.every == 0:
        for key in ("examples", "samples", "temperature"):
            yield True, f"eval.{key}", "in training with eval.every = 0 (`retrain eval` uses it)"

    yield bool(config.environment.provider), "data.*", "with an [environment]"
    for key in ("type", "parts", "judge_*", "custom_*", "timeout_s"):
        yield bool(config.environment.provider), f"reward.{key}", "with an [environment], which has its own rubric"
    yield not config.environment.provider, "environment.*", "without environment.provider"
    kind = source_kind(config.data.source)
    of_source = f'with data.source = "{config.data.source}"'
    yield kind not in ("file", "hub"), "data.*_field", of_source
    yield bool(config.data.prompt_template), "data.prompt_field", "with data.prompt_template"
    yield kind not in ("file", "hub", "problem_set"), "data.prompt_template", of_source
    yield kind not in ("hub", "problem_set"), "data.split", of_source

    yield from _backend_table(config)
    yield from _squeeze_table(config)


def _backpressure_table(bp: BackpressureConfig) -> Iterator[tuple[bool, str, str]]:
    yield not bp.enabled, "backpressure.*", "without backpressure.enabled"
    yield (
        bp.max_batch_size - bp.min_batch_size < 2,
        "backpressure.enabled",
        "but for the warm-up where min_batch_size and max_batch_size leave fewer than three sizes to compare",
    )
    yield bp.peak_bw_gb_s == 0, "backpressure.peak_gflops", "without backpressure.peak_bw_gb_s"
    yield bp.peak_gflops == 0, "backpressure.peak_bw_gb_s", "without backpressure.peak_gflops"


def _squeeze_table(config: Config) -> Iterator[tuple[bool, str, str]]:
    if config.squeeze is None:
        return
    alone, training = run_kind(config) == "squeeze", run_kind(config) == "train"
    for key in type(config.squeeze).model_fields:
        if key in SQUEEZE_OF_RUNS:
            yield alone, f"squeeze.{key}", "in a standalone squeeze, which trains nothing"
        else:
            yield training, f"squeeze.{key}", "in a training run (`retrain squeeze` uses it)"
    for key in ("compress_to", "per_layer"):
        yield not config.squeeze.output_path, f"squeeze.{key}", "without squeeze.output_path"


def _backend_table(config: Config) -> Iterator[tuple[bool, str, str]]:
    in_process = config.inference.engine == "pytorch"
    for key in ("inference.url", "inference.request_timeout_s", "inference.retries", "backend.adapter_path"):
        yield in_process and config.backend.backend == "local", key, 'with inference.engine = "pytorch"'
    urls = (
        config.inference.url,
        config.model.base_url,
        *(keys.judge_url for keys in (config.reward, *config.reward.parts)),
    )
    yield not any("http://" in url for url in urls), "inference.allow_http", "without an http:// address"
    yield not in_process, "inference.merged_copy", f'with inference.engine = "{config.inference.engine}"'
    remote = config.backend.backend == "tinker"
    for key in ("backend.service", "backend.max_concurrent", "backend.patience_s", "backend.state_ttl_s"):
        yield not remote, key, 'with backend.backend = "local"'
    at_a_service = {"max_logprob_gap", "allow_http", "top_p", "top_k"}
    for key in (
        "backend.devices",
        "backend.adapter_path",
        "training.micro_batch_tokens",
        "training.gradient_checkpointing",
        "training.dtype",
        *(f"inference.{name}" for name in InferenceConfig.model_fields if name not in at_a_service),
    ):
        yield remote, key, 'with backend.backend = "tinker"'
