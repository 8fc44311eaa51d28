"""What several processes that train one run together cannot do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.config.campaign import run_kind
from retrain.config.schema import Config
from retrain.types import ConfigError

# Each process takes the GPU that has its own number on its machine.
SHARED_DEVICES = ("cpu", "gpu", "gpu:0", "cuda", "cuda:0")


def check_ranks(config: Config, size: int) -> None:
    """Raise ConfigError where `size` processes cannot train `config` together."""
    if size == 1:
        return
    lines = [message for refused, message in _table(config, size) if refused]
    if lines:
        raise ConfigError("\n".join(lines))


def _table(config: Config, size: int) -> Iterator[tuple[bool, str]]:
    """(refused, message)"""
    devices, batch, bp = config.backend.devices, config.training.batch_size, config.backpressure
    alone = "start it as one process, without torchrun or --nproc"
    if run_kind(config) != "train":
        yield True, f"[{run_kind(config)}]: only the training of one run is shared out over processes; {alone}"
        return
    yield (
        config.backend.backend == "tinker",
        f'backend.backend = "tinker": the service trains, {size} processes would ask it for the same; {alone}',
    )
    yield (
        config.backend.backend == "local" and devices not in SHARED_DEVICES,
        f'backend.devices = "{devices}": each of {size} processes takes the GPU of its own number; write "gpu" for '
        f'that, or "cpu"; or {alone}',
    )
    yield (
        config.backend.sharding == "fsdp"
        and bool(config.environment.provider)
        and config.inference.engine == "pytorch",
        'backend.sharding = "fsdp": with an [environment], episodes of different lengths would have to be sampled in '
        'lockstep; let a server sample (inference.engine = "vllm" or "sglang"), or use backend.sharding = "none"',
    )
    yield (
        not bp.enabled and batch < size,
        f"training.batch_size = {batch}: {size} processes share the groups of a step out, some would have none; start "
        f"{batch} processes at most, or raise it",
    )
    yield (
        bp.enabled and bp.min_batch_size < size,
        f"backpressure.min_batch_size = {bp.min_batch_size}: {size} processes share the groups of a step out, some "
        f"would have none; start {bp.min_batch_size} processes at most, or raise it",
    )
