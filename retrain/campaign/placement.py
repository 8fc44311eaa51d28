"""How many runs at a time, and where: never more than devices, cores and memory allow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrain import estimate

if TYPE_CHECKING:
    from retrain.config import Config, Run

# Where the model's sizes are not known.
UNKNOWN_BYTES = 1 << 30
# One on a GPU holds the weights on the host while it loads them, and CUDA's own libraries.
GPU_PROCESS_BYTES = 4 << 30


@dataclass(frozen=True)
class Placement:
    """devices: one for each run at a time ("" = as the config says). threads: for each on a CPU, 0 = their own choice.
    why: what set the number."""

    devices: tuple[str, ...]
    threads: int
    why: str


def place(config: Config, matrix: tuple[Run, ...]) -> Placement:
    """For the runs of `matrix` on this machine."""
    campaign, devices = config.campaign, config.backend.devices.split(",")
    assert campaign is not None
    in_process = config.inference.engine == "pytorch" or len(devices) > 1
    if not campaign.parallel:
        return Placement((devices[0],), 0, "campaign.parallel = false")
    if campaign.max_workers:
        count, why = campaign.max_workers, f"campaign.max_workers = {campaign.max_workers}"
    else:
        limits = {"cores": usable_cores(), "memory": available_bytes() // run_bytes(matrix)}
        if devices[0] != "cpu" and in_process:
            limits["devices"] = len(devices)
        why, count = min(limits.items(), key=lambda item: item[1])
        why = f"as many as {why} allow" if why != "memory" else "as many as the memory allows"
    if count >= len(matrix):
        count, why = len(matrix), "all at once"
    count = max(1, count)
    return Placement(tuple(devices[i % len(devices)] for i in range(count)), threads(config, count), why)


def threads(config: Config, count: int) -> int:
    """CPU threads for each of `count` runs, so that together they use each core once; 0 where a run knows best."""
    if count == 1 or config.backend.devices != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return 0
    found = estimate.find_model_config(config.model.model)
    shape = estimate.shape_of(found) if found else None
    if shape is not None and shape.parameters < estimate.SMALL_MODEL:
        return 0  # takes one thread by itself
    return max(1, usable_cores() // count)


def run_bytes(matrix: tuple[Run, ...]) -> int:
    """Host memory of the largest run."""
    return max(_run_bytes(run.config) for run in matrix)


def _run_bytes(config: Config) -> int:
    model_config = estimate.find_model_config(config.model.model)
    shape = estimate.shape_of(model_config) if model_config else None
    if shape is None or config.backend.backend != "local":
        return GPU_PROCESS_BYTES if config.backend.devices != "cpu" else UNKNOWN_BYTES
    found = estimate.processes(config, shape, one_device=True)
    return sum(process.peak_bytes if process.device == "cpu" else GPU_PROCESS_BYTES for process in found)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be taken without swapping; all there is where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - no file of ours
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
