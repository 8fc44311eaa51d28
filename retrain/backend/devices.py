"""`[backend] devices` to torch devices, and what runs on them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retrain.distributed import World
from retrain.estimate import SMALL_MODEL
from retrain.types import ConfigError
from retrain_kernels import dispatch

if TYPE_CHECKING:
    from retrain.config import BackendConfig

_NAME = re.compile(r"(cpu|mps|(?:gpu|cuda)(?::(\d+))?)")
# A GPU's allocator raises a type of its own; these come as plain RuntimeError.
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def resolve_device(name: str, say: Callable[[str], None]) -> torch.device:
    """`cpu`, `mps`, `gpu:N` or `cuda:N`. Without a GPU, `gpu:0` (the default) is Metal or the CPU, and `say` tells so.

    Raises ConfigError for a device that this machine does not have.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise ConfigError(f'backend.devices = "{name}": write "cpu", "mps" or "gpu:N"')
    if match[1] == "cpu":
        return torch.device("cpu")
    if match[1] == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError('backend.devices = "mps": this machine has no Metal device; use "cpu"')
        return torch.device("mps")
    index, count = int(match[2] or 0), torch.cuda.device_count()
    if index < count:
        return torch.device("cuda", index)
    if count:
        there = "gpu:0" if count == 1 else f"gpu:0 to gpu:{count - 1}"
        raise ConfigError(f'backend.devices = "{name}": this machine has {there}')
    if index:
        raise ConfigError(f'backend.devices = "{name}": this machine has no GPU; use "cpu"')
    fallback = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    say(f"no CUDA or ROCm GPU on this machine: {name} runs on {fallback}")
    return fallback


def resolve_devices(section: BackendConfig, say: Callable[[str], None]) -> tuple[torch.device, torch.device, int]:
    """Where to sample and where to train, and how many processes compute on each: two where they share it."""
    samples = resolve_device(section.samples_on, say)
    trains = resolve_device(section.trains_on, say) if section.is_split else samples
    return samples, trains, 2 if section.is_split and samples == trains else 1


def device_of_rank(name: str, world: World) -> str:
    """The `[backend] devices` of one rank: of GPUs, the one of its number on its machine; alone, what is configured.

    Raises ConfigError where there are more ranks on this machine than GPUs.
    """
    if world.size == 1 or name == "cpu":
        return name
    count = torch.cuda.device_count()
    if count == 0:
        # Metal is one device, and cannot be shared.
        return "cpu" if torch.backends.mps.is_available() else name
    if world.local_size > count:
        raise ConfigError(
            f'backend.devices = "{name}": {world.local_size} processes on a machine with {count} GPUs, and each takes '
            f'one; start {count} of them, or use "cpu"'
        )
    torch.cuda.set_device(world.local_rank)
    return f"gpu:{world.local_rank}"


def kernels_on(device: torch.device) -> tuple[str, str]:
    """The implementation of the numeric operations on `device`, "triton" or "reference", and why not the other."""
    return dispatch.resolve("auto", device), dispatch.obstacle(device) or ""


def settle_threads(device: torch.device, parameters: int, processes: int = 1) -> None:
    """One CPU thread for a small model, a share of the cores for each of several processes, unless OMP_NUM_THREADS says
    otherwise.

    A small model's operations are too short to share: two threads save a tenth to a third on an idle machine and,
    spinning, take three times as long as soon as anything else runs (docs/experiments.md).
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    elif processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`[training] dtype` of the frozen base: auto is float32 on the CPU, bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: on the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource
    import sys

    if sys.platform == "linux":
        # Its rusage would begin with what the process that started this one held.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"VmHWM:\s*(\d+) kB", status):
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
