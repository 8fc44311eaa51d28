"""Number formats and attention kernels: what the in-process engine offers, and who offers the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from retrain.config import InferenceConfig

# `[inference] dtype` and `kv_cache_dtype`; "auto" is the format of the model, or of the sampling copy.
WEIGHTS = {"bf16": torch.bfloat16}
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def refusal(section: InferenceConfig, device: torch.device) -> str | None:
    """Why the in-process engine cannot do what `section` asks for on `device`, and what can; None where it can.

    What depends on the model too is decided by `retrain.inference.pytorch.open_decoder`.
    """
    kernel, dtype, cache = section.attention_kernel, section.dtype, section.kv_cache_dtype
    if kernel == "tk":
        return (
            'inference.attention_kernel = "tk": no inference engine offers ThunderKittens\' kernels for the models '
            'trained here; use "default"'
        )
    if kernel != "default":
        return (
            f'inference.attention_kernel = "{kernel}": the in-process engine has one way to attend, in which a group '
            'shares its prompt; use "default", or inference.engine = "vllm" or "sglang" with a GPU server that you '
            "start with --attention-backend"
        )
    if dtype not in ("auto", *WEIGHTS):
        hardware = {"fp8": "NVIDIA Ada, Hopper or later, AMD MI300", "fp4": "NVIDIA Blackwell"}[dtype]
        return (
            f'inference.dtype = "{dtype}": the in-process engine samples in the model\'s format or in "bf16"; for '
            f'{dtype}, use inference.engine = "vllm" or "sglang" with a server that you start with such a model '
            f"({hardware})"
        )
    if cache == "int8":
        return (
            'inference.kv_cache_dtype = "int8": the in-process engine has "bf16" and "fp8"; for int8, use '
            'inference.engine = "vllm" with a GPU server that you start with --kv-cache-dtype int8_per_token_head'
        )
    if cache == "fp8" and device.type == "mps":
        return 'inference.kv_cache_dtype = "fp8": Metal has no such format; use "bf16" or "auto"'
    return None
