"""The one table of combinations that are refused: what each value may be on its own is said by the schema."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from retrain.config.addresses import address_problems
from retrain.config.engines import inference_problems
from retrain.config.fields import source_kind
from retrain.config.schema import Config
from retrain.config.sections import CampaignConfig, RewardConfig, SqueezeConfig
from retrain.config.service import service_problems
from retrain.redact import secrets_of


def problems(config: Config) -> list[str]:
    """What is wrong with the values taken together, one message each; empty when nothing is."""
    tables = [_table(config)]
    if config.squeeze is not None:
        tables += [_squeeze_table(config.squeeze), _shrinking_table(config, config.squeeze)]
    if config.campaign is not None:
        tables.append(_campaign_table(config.campaign))
    return [message for table in tables for refused, message in table if refused]


def leaks(config: Config) -> Iterator[str]:
    """A message for each key that holds a secret of the environment: a config goes into the run folder as it is."""
    secrets = secrets_of()
    if not secrets:
        return
    for section, table in config.model_dump(mode="json", by_alias=True, exclude_none=True).items():
        for key, value in table.items():
            texts = list(_strings(value))
            name = next((name for secret, name in secrets.items() if any(secret in text for text in texts)), None)
            if name is not None:
                yield f"{section}.{key}: holds the value of ${name}, which would be written into the run folder"


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _strings(list(value.values()))
        case list():
            for inner in value:
                yield from _strings(inner)


def _table(config: Config) -> Iterator[tuple[bool, str]]:
    """(refused, message) of every rule about a run."""
    training, loss, algorithm = config.training, config.loss, config.algorithm
    inference, environment, reward, bp = config.inference, config.environment, config.reward, config.backpressure
    completions = training.batch_size * training.group_size

    for message in (*inference_problems(inference), *address_problems(config), *service_problems(config)):
        yield True, message
    yield (
        algorithm.overlong_buffer > 0 and algorithm.advantage_mode == "maxrl",
        "algorithm.overlong_buffer: its penalty makes rewards negative, and maxrl needs rewards in [0, 1]; "
        'set it to 0 or use another algorithm.advantage_mode, such as "grpo"',
    )
    yield (
        algorithm.overlong_buffer >= training.max_tokens,
        f"algorithm.overlong_buffer = {algorithm.overlong_buffer}: must be less than training.max_tokens "
        f"({training.max_tokens})",
    )
    yield (
        0 < loss.dual_clip <= 1,
        f"loss.dual_clip = {loss.dual_clip}: must be 0 (off) or greater than 1",
    )
    yield (
        loss.mismatch_correction != "none" and loss.old_logprobs != "recompute",
        f'loss.mismatch_correction = "{loss.mismatch_correction}": the ratio to the sampler carries the correction '
        'already; set loss.old_logprobs = "recompute" or remove it',
    )
    yield (
        loss.minibatches > completions,
        f"loss.minibatches = {loss.minibatches}: must not be more than the completions of a step "
        f"(training.batch_size * group_size = {completions})",
    )
    yield from _placement_table(config)
    yield (
        training.lr_schedule != "constant" and training.warmup_steps >= training.max_steps,
        f"training.warmup_steps = {training.warmup_steps}: must be less than training.max_steps ({training.max_steps}) "
        f'with lr_schedule = "{training.lr_schedule}"',
    )
    yield (
        config.eval.samples > 1 and config.eval.temperature == 0,
        f"eval.samples = {config.eval.samples}: greedy completions are all the same; set eval.temperature above 0 "
        "or samples to 1",
    )
    yield (
        bool(config.model.base_url) and config.backend.backend != "tinker",
        'model.base_url: only the tinker backend has a service; set backend.backend = "tinker" or remove it',
    )
    yield (
        bool(environment.provider) and not environment.id,
        f'environment.provider = "{environment.provider}": needs environment.id, as in "primeintellect/gsm8k"',
    )
    yield (
        bool(environment.id) and not environment.provider,
        'environment.id: needs environment.provider = "verifiers"',
    )
    yield (environment.max_turns == 0, "environment.max_turns = 0: must be -1 (no override) or >= 1")
    yield from _reward_table(reward)
    yield (
        source_kind(config.data.source) == "reasoning_gym"
        and not environment.provider
        and (reward.type != "match" or bool(reward.parts)),
        f'data.source = "{config.data.source}": its tasks score by themselves; remove reward.type and reward.parts',
    )
    yield (
        algorithm.advantage_mode == "maxrl" and _may_leave_unit(reward),
        "reward.parts: with these weights the sum may leave [0, 1], and maxrl needs rewards within; take weights from "
        '0 on that sum to 1 at most, or another algorithm.advantage_mode, such as "grpo"',
    )
    yield (
        bp.enabled and bp.min_batch_size * training.group_size < loss.minibatches <= completions,
        f"loss.minibatches = {loss.minibatches}: must not be more than the completions of the smallest step "
        f"(backpressure.min_batch_size * training.group_size = {bp.min_batch_size * training.group_size})",
    )
    yield (
        bp.min_batch_size > bp.max_batch_size,
        f"backpressure.min_batch_size = {bp.min_batch_size}: must not be above max_batch_size ({bp.max_batch_size})",
    )
    yield (
        bp.enabled and not bp.min_batch_size <= training.batch_size <= bp.max_batch_size,
        f"training.batch_size = {training.batch_size}: must lie within backpressure.min_batch_size and max_batch_size "
        f"({bp.min_batch_size} to {bp.max_batch_size})",
    )


def _placement_table(config: Config) -> Iterator[tuple[bool, str]]:
    """Rules about what runs where, and when."""
    training, devices = config.training, config.backend.devices
    # A campaign shares its devices out: each run has one.
    several = "," in devices and config.campaign is None and config.backend.backend == "local"
    yield (
        several and devices.count(",") > 1,
        f'backend.devices = "{devices}": the first samples and the last trains, nothing would run on the others; name '
        "two, or start a process for each (retrain --nproc N) with one",
    )
    yield (
        several and config.inference.engine != "pytorch",
        f'backend.devices = "{devices}": with inference.engine = "{config.inference.engine}" its servers sample, and '
        "nothing would run on the first; name one",
    )
    yield (
        several and config.backend.sharding != "none",
        f'backend.sharding = "{config.backend.sharding}": the process that samples would hold the whole base; name '
        f'one device (now backend.devices = "{devices}")',
    )
    yield (
        training.max_staleness > 0 and config.backpressure.enabled,
        f"training.max_staleness = {training.max_staleness}: backpressure would measure steps in which batches of "
        "different sizes are sampled and trained on; set it to 0 or backpressure.enabled = false",
    )
    yield (
        training.max_staleness > 0
        and config.loss.old_logprobs == "recompute"
        and config.loss.mismatch_correction == "none",
        f'training.max_staleness = {training.max_staleness}: with loss.old_logprobs = "recompute" nothing corrects '
        'for the older policy that sampled; set loss.mismatch_correction, or old_logprobs = "sampler"',
    )


def _reward_table(reward: RewardConfig) -> Iterator[tuple[bool, str]]:
    for place, keys in (("reward", reward), *((f"reward.parts[{i}]", part) for i, part in enumerate(reward.parts))):
        yield (keys.type == "judge" and not keys.judge_model, f'{place}.type = "judge": needs {place}.judge_model')
        yield (
            keys.type == "custom" and not keys.custom_module,
            f'{place}.type = "custom": needs {place}.custom_module',
        )
    names = [part.label for part in reward.parts]
    yield (len(set(names)) < len(names), "reward.parts: two have the same name; give each a `name` of its own")


def _may_leave_unit(reward: RewardConfig) -> bool:
    """Whether the weights let the sum of parts leave [0, 1]; what a custom reward may be is not known here."""
    if any(part.type == "custom" for part in reward.parts):
        return False
    weights = [part.weight for part in reward.parts]
    return min(weights, default=0.0) < 0 or sum(weights) > 1 + 1e-9


def _squeeze_table(squeeze: SqueezeConfig) -> Iterator[tuple[bool, str]]:
    ranks, source = squeeze.target_ranks, squeeze.source_rank
    yield (any(rank < 1 for rank in ranks), "squeeze.target_ranks: every rank must be >= 1")
    yield (len(set(ranks)) < len(ranks), "squeeze.target_ranks: names a rank twice")
    yield (
        source > 0 and any(rank > source for rank in ranks),
        f"squeeze.target_ranks: no rank may be above squeeze.source_rank ({source})",
    )
    yield (
        0 < source < squeeze.compress_to,
        f"squeeze.compress_to = {squeeze.compress_to}: must not be above squeeze.source_rank ({source})",
    )
    yield (
        squeeze.per_layer and squeeze.compress_to > 0,
        f"squeeze.compress_to = {squeeze.compress_to}: with per_layer the ranks follow from min_variance_retention; "
        "remove one of the two",
    )


def _shrinking_table(config: Config, squeeze: SqueezeConfig) -> Iterator[tuple[bool, str]]:
    """Rules about squeezing in the course of a training."""
    steps, ranks = squeeze.at_steps, squeeze.to_ranks
    last = (config.campaign and config.campaign.max_steps) or config.training.max_steps
    yield (
        len(steps) != len(ranks),
        f"squeeze.at_steps and squeeze.to_ranks: name {len(steps)} steps and {len(ranks)} ranks; give a rank for each",
    )
    yield (
        any(step < 1 for step in steps) or any(b <= a for a, b in pairwise(steps)),
        "squeeze.at_steps: must rise, from 1 on",
    )
    yield (
        any(rank < 1 for rank in ranks) or any(b >= a for a, b in pairwise((config.model.lora_rank, *ranks))),
        f"squeeze.to_ranks: must fall, from below model.lora_rank ({config.model.lora_rank}) to 1 at the lowest",
    )
    yield (
        any(step > last for step in steps),
        f"squeeze.at_steps: no step may lie after the last one ({last})",
    )
    yield (
        bool(steps) and config.backend.backend != "local",
        f'squeeze.at_steps: the adapter of backend.backend = "{config.backend.backend}" has the rank it begins with; '
        'use "local"',
    )


def _campaign_table(campaign: CampaignConfig) -> Iterator[tuple[bool, str]]:
    yield (not campaign.seeds, "campaign.seeds: must name at least one seed")
    yield (any(seed < 0 for seed in campaign.seeds), "campaign.seeds: every seed must be >= 0, so that runs are paired")
    yield (len(set(campaign.seeds)) < len(campaign.seeds), "campaign.seeds: names a seed twice")
    yield (
        bool(campaign.ray_address) and campaign.executor != "ray",
        'campaign.ray_address: set campaign.executor = "ray" or remove it',
    )
