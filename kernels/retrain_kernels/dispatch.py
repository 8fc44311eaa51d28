"""Which implementation of an operation runs: the one meaning of the `impl` argument."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

IMPLEMENTATIONS = ("auto", "reference", "triton")
# bfloat16 tensor cores and the kernels' shared memory begin with Ampere.
_OLDEST_CUDA = (8, 0)


def implementation(op: str, impl: str, device: torch.device, *, float64: bool = False) -> Callable[..., Any]:
    """The function that computes `op` (a folder of this package) on tensors of `device`.

    impl: "reference" is plain PyTorch on any device. "triton" is the fused kernel. "auto" is "triton" on CUDA and ROCm
    tensors wherever it can run, else "reference". The kernels compute in float32, so an operation asked for `float64`
    is the reference's. Raises ValueError for any other name, RuntimeError where "triton" cannot run, saying why.
    """
    # The kernel module is imported on use: where it does not run, triton need not be installed.
    module = "kernel" if resolve(impl, device, float64=float64) == "triton" else "reference"
    return getattr(import_module(f"retrain_kernels.{op}.{module}"), op)


def resolve(impl: str, device: torch.device, *, float64: bool = False) -> str:
    """Name the implementation, "reference" or "triton", that `impl` stands for. See `implementation`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "triton":
        problem = "the kernels compute in float32 and a tensor is float64" if float64 else obstacle(device)
        if problem:
            raise RuntimeError(f'impl="triton" cannot run: {problem}')
        return "triton"
    on_gpu = device.type == "cuda"  # torch's name for ROCm devices too
    return "triton" if impl == "auto" and on_gpu and not float64 and obstacle(device) is None else "reference"


def obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of `device`; None where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return (
            f"Triton runs on CUDA and ROCm tensors, these are on {device} "
            "(TRITON_INTERPRET=1 interprets the kernels on CPU tensors, slowly, for tests)"
        )
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if device.type == "cuda" and torch.version.hip is None and not interpreting():
        return _too_old(torch.cuda.current_device() if device.index is None else device.index)
    return None


@cache
def _too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST_CUDA:
        return None
    return f"{torch.cuda.get_device_name(index)} has compute capability {capability}, the kernels need {_OLDEST_CUDA}"


def interpreting() -> bool:
    """Whether Triton interprets its kernels in Python instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to `device`; Triton would take the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
