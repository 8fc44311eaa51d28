"""The record of a benchmark run: the machine, the versions, every figure; and the table made from it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

PACKAGES = ("torch", "triton", "liger-kernel", "trl", "transformers", "peft")
COLUMNS = ("", "time, ms", "quartiles", "over ours", "peak, MB", "worst error", "computes")


def about_this_run(command: str, device: torch.device) -> dict[str, Any]:
    """What a reader needs to run it again: date, command line, hardware, versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": _hardware(device),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, quartiles and every value; None where there is none."""
    if not values:
        return None
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "quartiles": [low, high], "rounds": list(values)}


def table(record: Mapping[str, Any]) -> str:
    """What is printed: one line an entry, one a target."""
    hardware, shape = record["hardware"], ", ".join(f"{name} {size:,}" for name, size in record["shape"].items())
    place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    lines = [f"{record['benchmark']}: {shape}, {record['dtype']}, on {place}, torch {record['versions']['torch']}", ""]
    rows = [COLUMNS, *map(_row, record["entries"])]
    measured = [row for row in rows if len(row) == len(COLUMNS)]
    widths = [max(map(len, column)) for column in zip(*measured, strict=True)]
    widths[0] = max(len(row[0]) for row in rows)
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    lines += ["", *map(target_line, record["targets"])] if record["targets"] else []
    return "\n".join(lines)


def target_line(target: Mapping[str, Any]) -> str:
    verdict = {True: "target met", False: "TARGET MISSED", None: "target not judged"}[target["met"]]
    value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
    return f"{verdict}: {target['name']} {value}, at most {target['at_most']:.3g}"


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    times, over, peak = entry["milliseconds"], entry["time_over_ours"], entry["peak_bytes_over_inputs_and_outputs"]
    if times is None:
        return entry["name"], "not timed" if entry["status"] == "ok" else entry["status"]
    low, high = times["quartiles"]
    return (
        entry["name"],
        f"{times['median']:.4g}",
        f"{low:.4g} to {high:.4g}",
        f"{over['median']:.3g}x",
        "" if peak is None else f"{peak / 1e6:.4g}",
        f"{max(entry['errors'].values()):.1e}" if entry["errors"] else "",
        entry["computes"],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
