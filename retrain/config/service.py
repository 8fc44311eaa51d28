"""What a run at a Tinker service cannot have: refused when the config is loaded, with the keys named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retrain.config.schema import changed
from retrain.config.show import show_key

if TYPE_CHECKING:
    from retrain.config.schema import Config


Reduction = Literal["sum", "sequence_mean"]


@dataclass(frozen=True)
class ServiceKind:
    """What is known of the services that speak the Tinker API.

    reduction: how token losses become the loss of an update: "sum" of all, or the "sequence_mean": the mean over
    sequences of the mean over a sequence's tokens. clips: whether it cuts gradients to `training.max_grad_norm`.
    """

    reduction: Reduction
    clips: bool


KINDS = {"tinker": ServiceKind("sum", clips=True), "skyrl": ServiceKind("sequence_mean", clips=False)}


def service_problems(config: Config) -> Iterator[str]:
    """A message for each setting that `backend = "tinker"` cannot honour; none with another backend."""
    if config.backend.backend != "tinker":
        return
    loss, training, service = config.loss, config.training, config.backend.service
    if training.temperature != 1:
        yield (
            f"{show_key('training.temperature', training.temperature)}: a Tinker service computes log-probabilities at "
            "temperature 1, so sampling at another one would train on wrong ratios; set it to 1.0"
        )
    if training.max_staleness > 0:
        yield (
            f"{show_key('training.max_staleness', training.max_staleness)}: a checkpoint would need older policies, "
            "which a Tinker service keeps to itself; set it to 0"
        )
    if loss.kind == "gspo":
        yield 'loss.kind = "gspo": a Tinker service has importance_sampling, ppo and cispo; use one of them'
    for key in ("dual_clip", "kl_coef", "entropy_coef"):
        if getattr(loss, key) != 0:
            yield f"{show_key(f'loss.{key}', getattr(loss, key))}: a Tinker service has no such term; set it to 0"
    if loss.old_logprobs != "sampler":
        yield (
            f'loss.old_logprobs = "{loss.old_logprobs}": a Tinker service trains against what its sampler reported; '
            'set it to "sampler"'
        )
    if config.algorithm.uncertainty == "entropy":
        yield (
            'algorithm.uncertainty = "entropy": a Tinker service gives log-probabilities only; use "surprisal", '
            '"variance" or "auto" (surprisal)'
        )
    for path, value in changed(config).items():
        if path.startswith("lora."):
            yield f"{show_key(path, value)}: a Tinker service shapes its adapters itself; remove it"
    if training.max_grad_norm > 0 and not KINDS[service].clips:
        yield (
            f'{show_key("training.max_grad_norm", training.max_grad_norm)}: a service of the kind "{service}" does not '
            "clip gradients; set it to 0"
        )
