"""Compile every Triton kernel ahead of time for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942. No GPU is needed.

python scripts/compile_kernels.py [sm_90 ...]    all targets, or those named

The operations run as they always do, on CPU tensors, forward and backward, but every launch is recorded instead of
made; what they would have launched is then compiled for the target. Prints registers, spills and shared memory of each
program, and exits 1 where one does not compile or exceeds the chip's limits.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

# The interpreter's kernels cannot be compiled. Triton reads this when it is first imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from retrain_kernels import dispatch, linear_logprob, policy_loss, token_advantages
from retrain_kernels.linear_logprob import kernel as linear_logprob_kernel
from retrain_kernels.policy_loss import AGGREGATIONS, KINDS, KL_ESTIMATORS
from retrain_kernels.token_advantages import ADVANTAGE_MODES, TRANSFORM_MODES

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """What a program may take: bytes of shared memory a block, registers a thread."""

    target: GPUTarget
    shared_memory: int
    registers: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 255),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 255),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 255),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 512),
}


@dataclass(frozen=True)
class Launch:
    """One program to compile: a kernel with the types of its arguments, its constants and its options."""

    kernel: JITFunction
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", choices=[[], *CHIPS], default=[], help="default: all")
    chips = parser.parse_args().chips or list(CHIPS)
    # Triton 3.9 announces another default for 3.10 at every compilation.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print(f"{'chip':8}{'kernel':22}{'registers':>10}{'spilled':>9}{'shared':>9}  constants")
    failures = [failure for name in chips for failure in compile_all(name, CHIPS[name])]
    print("\n".join(failures) or "every kernel compiles, within the limits of every chip", file=sys.stderr)
    return 1 if failures else 0


def compile_all(name: str, chip: Chip) -> Iterator[str]:
    """Print a line a program; yield what is wrong."""
    launches = dict.fromkeys(recorded_launches(chip))
    if not launches:
        yield f"{name}: nothing was launched"
    for launch in launches:
        kernel = launch.kernel.fn.__name__
        try:
            registers, spilled, shared = compile_one(launch, chip)
        except Exception as exc:  # noqa: BLE001 - whatever the compiler raises is the finding
            yield f"{name}: {kernel} does not compile: {exc}"
            continue
        constants = " ".join(f"{key}={value}" for key, value in launch.constants if value is not None)
        print(f"{name:8}{kernel:22}{registers:10}{spilled:9}{shared:9}  {constants}", flush=True)
        if registers > chip.registers or shared > chip.shared_memory:
            yield f"{name}: {kernel} takes {registers} registers and {shared} bytes of shared memory ({constants})"


def compile_one(launch: Launch, chip: Chip) -> tuple[int, int, int]:
    """Registers a thread, registers spilled to memory, and bytes of shared memory."""
    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.types) | {key: "constexpr" for key, _ in launch.constants},
        constexprs={(names.index(key),): value for key, value in launch.constants},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in launch.divisible},
    )
    compiled = triton.compile(source, target=chip.target, options=dict(launch.options))
    registers, spilled = (
        _amd_registers(compiled.asm["amdgcn"])
        if chip.target.backend == "hip"
        else _nvidia_registers(compiled.asm["cubin"])
    )
    return registers, spilled, compiled.metadata.shared


def _nvidia_registers(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [NVIDIA_TOOLS / tool, *options, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", []))
        )
    found = re.findall(r"REG:(\d+)", usage)
    return max(map(int, found)), len(re.findall(r"\bSTL\b", code))


def _amd_registers(assembly: str) -> tuple[int, int]:
    count = {
        key: max(map(int, re.findall(rf"\.{key}:\s+(\d+)", assembly))) for key in ("vgpr_count", "vgpr_spill_count")
    }
    return count["vgpr_count"], count["vgpr_spill_count"]


def recorded_launches(chip: Chip) -> list[Launch]:
    """What the operations launch, over all their modes, on a device with the shared memory of `chip`."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(dispatch, "obstacle", lambda device: None),
        mock.patch.object(linear_logprob_kernel, "_shared_memory", lambda device: chip.shared_memory),
    ):
        run_linear_logprob()
        run_token_advantages()
        run_policy_loss()
    return launches


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As the just-in-time compiler would specialise it."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
    constants, types, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and isinstance(value, int) and value == 1):
            constants.append((name, value))
            continue
        types.append((name, _type_of(value)))
        place = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if specialise and isinstance(place, int) and place % 16 == 0:
            divisible.append(name)
    options = tuple((key, value) for key, value in kwargs.items() if key not in names)
    return Launch(kernel, tuple(types), tuple(constants), tuple(divisible), options)


_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def run_linear_logprob() -> None:
    cases = [(torch.bfloat16, 128, False), (torch.bfloat16, 136, True), (torch.float16, 128, False)]
    for dtype, depth, has_bias in [*cases, (torch.float32, 128, True)]:
        hidden, weight = torch.zeros(32, depth, dtype=dtype, requires_grad=True), torch.zeros(1024, depth, dtype=dtype)
        bias = torch.zeros(1024, dtype=dtype) if has_bias else None
        for entropy_grad in (False, True):
            logprob, entropy = linear_logprob(
                hidden, weight, torch.zeros(32, dtype=torch.int64), bias=bias, entropy_grad=entropy_grad, impl="triton"
            )
            (logprob + entropy).sum().backward()


def run_token_advantages() -> None:
    cu_seqlens, group_ids = torch.tensor([0, 40, 64], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    modes = [("precomputed", mode) for mode in TRANSFORM_MODES] + [
        (mode, "gtpo_sepa_hicra") for mode in ADVANTAGE_MODES
    ]
    for advantage_mode, transform_mode in modes:
        token_advantages(
            torch.ones(2),
            torch.ones(64),
            torch.zeros(64, dtype=torch.bool),
            cu_seqlens,
            group_ids,
            advantage_mode=advantage_mode,
            transform_mode=transform_mode,
            sepa_lambda=0.5,
            impl="triton",
        )


def run_policy_loss() -> None:
    cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32)
    vectors: dict[str, Any] = {"ref_logprob": torch.zeros(64), "entropy": torch.zeros(64), "weights": torch.ones(64)}
    vectors |= {"kl_coef": 0.1, "entropy_coef": 0.1}
    cases: list[tuple[str, str, dict[str, Any]]] = [(kind, how, {}) for kind, how in product(KINDS, AGGREGATIONS)]
    cases += [("ppo", "token_mean", vectors | {"kl_estimator": estimator}) for estimator in KL_ESTIMATORS]
    for kind, aggregation, extras in cases:
        loss, _ = policy_loss(
            torch.zeros(64, requires_grad=True),
            torch.zeros(64),
            torch.ones(64),
            cu_seqlens,
            kind=kind,
            clip_low=0.2,
            clip_high=0.28,
            aggregation=aggregation,
            denominator=64,
            dual_clip=3.0 if kind == "ppo" else 0.0,
            impl="triton",
            **extras,
        )
        loss.backward()


if __name__ == "__main__":
    sys.exit(main())
