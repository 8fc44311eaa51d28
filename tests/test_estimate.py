"""The estimate of a run's memory: its parts against what torch really allocates, and its peak against real runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrain import estimate
from retrain.backend import packing
from retrain.backend.local import LocalBackend
from retrain.config import build
from retrain.estimate import work
from retrain.estimate.activations import activations
from retrain.estimate.memory import CPU_LOGITS_ELEMENTS, GPU_LOGITS_ELEMENTS, Process
from retrain.types import Batch, Rollout
from retrain_kernels.linear_logprob import reference
from scripts.scaling import MODELS

SHAPE = estimate.ModelShape(
    hidden=48, layers=3, heads=6, kv_heads=2, head_dim=8, intermediate=80, vocab=100_000, tied=True
)
SMALL: dict[str, Any] = {
    "training": {"batch_size": 8, "group_size": 4, "max_tokens": 100, "max_prompt_tokens": 20},
    "model": {"lora_rank": 4},
}


def processes(shape: estimate.ModelShape = SHAPE, nproc: int = 1, **keys: Any) -> list[Process]:
    keys = {"backend.devices": "gpu:0"} | {key.replace("__", "."): value for key, value in keys.items()}
    return estimate.processes(build(SMALL, keys), shape, nproc)


def kept(process: Process) -> dict[str, int]:
    return {part.name: part.bytes for part in process.kept}


def within(process: Process) -> dict[str, dict[str, int]]:
    return {phase.name: {part.name: part.bytes for part in phase.parts} for phase in process.phases}


def test_parts_on_a_cpu() -> None:
    adapter = 3 * 4 * (4 * 48 + 2 * (48 + 16) + 3 * (48 + 80))
    (process,) = processes(backend__devices="cpu")
    parts = kept(process)
    assert parts["base weights"] == SHAPE.parameters * 4
    assert parts["LoRA weights"] == parts["LoRA gradients"] == adapter * 4
    assert parts["Adam state"] == adapter * 8
    # Laid out for oneDNN: every layer and the head; the embedding and the norms are the base's own.
    assert parts["merged copy"] == (SHAPE.parameters - 3 * 2 * 48 - 48) * 4
    assert within(process)["sampling"]["KV cache"] == 2 * 3 * 2 * 8 * (8 * 20 + 32 * 100) * 4
    assert process.peak_bytes == sum(parts.values()) + max(sum(phase.values()) for phase in within(process).values())
    assert parts["process"] > 2**28


def test_on_a_gpu_only_the_device_counts_and_the_copy_has_the_adapted_layers_alone() -> None:
    (process,) = processes()
    parts = kept(process)
    assert "process" not in parts
    assert parts["base weights"] == SHAPE.parameters * 2
    linear = 3 * sum(a * b for a, b in SHAPE.linears.values())
    assert parts["merged copy"] == linear * 2
    assert "allocator" not in within(process)["training"]
    (few,) = processes(lora__target_modules=("q_proj",))
    assert kept(few)["merged copy"] == 3 * 48 * 48 * 2
    (none,) = processes(inference__merged_copy=False)
    assert "merged copy" not in kept(none)


def test_split_mode_samples_on_the_first_device_and_trains_on_the_last() -> None:
    sampler, trainer = processes(backend__devices="gpu:0, gpu:1", training__max_staleness=2)
    assert (sampler.device, trainer.device) == ("gpu:0", "gpu:1")
    adapter = kept(trainer)["LoRA weights"]
    assert kept(sampler).keys() == {"base weights", "LoRA weights", "merged copy", "staged versions"}
    assert kept(sampler)["staged versions"] == 2 * adapter
    assert kept(trainer).keys() == {"base weights", "LoRA weights", "LoRA gradients", "Adam state"}
    assert within(sampler).keys() == {"sampling", "publishing"}
    assert within(trainer).keys() == {"training"}


def test_a_server_samples_elsewhere_and_a_service_does_everything() -> None:
    (process,) = processes(inference__engine="vllm", inference__url="http://localhost:8000")
    assert within(process).keys() == {"training"}
    assert "merged copy" not in kept(process)
    assert processes(backend__backend="tinker", model__base_url="https://example.org", training__temperature=1.0) == []


def test_data_parallel_shares_the_completions_and_fsdp_the_blocks() -> None:
    (alone,), (two,) = processes(), processes(nproc=2)
    assert (two.count, kept(two)) == (2, kept(alone))
    assert within(two)["sampling"]["KV cache"] * 2 == within(alone)["sampling"]["KV cache"]
    (sharded,) = processes(nproc=4, backend__sharding="fsdp")
    blocks = SHAPE.layers * SHAPE.block
    assert kept(sharded)["base weights"] == (SHAPE.parameters - blocks + blocks / 4) * 2
    assert "merged copy" not in kept(sharded)
    for phase in within(sharded).values():
        assert phase["gathered layers"] == 2 * SHAPE.block * 2
    # Through the modules, every completion has a prompt's keys and values of its own.
    assert within(sharded)["sampling"]["KV cache"] == 2 * 3 * 2 * 8 * (2 * 4) * 120 * 2


def test_recomputing_needs_less_memory() -> None:
    parts = [
        within(processes(training__gradient_checkpointing=checkpointing)[0])["training"]["activations"]
        for checkpointing in (True, False)
    ]
    assert parts[0] < parts[1]


def test_constants_are_those_of_what_they_stand_for() -> None:
    assert work.TOKEN_COST == packing.TOKEN_COST
    assert CPU_LOGITS_ELEMENTS == reference.CHUNK_ELEMENTS
    kernel = pytest.importorskip("retrain_kernels.linear_logprob.kernel", exc_type=ImportError)
    assert GPU_LOGITS_ELEMENTS == kernel.CHUNK_ELEMENTS


# ---- packing and activations, against the real ones


def full_batch(prompts: int, size: int, prompt: int, length: int) -> Batch:
    """Every completion at its limit. Token ids of builtin:tiny."""
    completion = np.arange(length) % 300 + 3
    rollouts = [
        Rollout(group, completion, np.full(length, -1.0), float(i % 2) - 0.5, np.zeros(length, dtype=bool))
        for group in range(prompts)
        for i in range(size)
    ]
    return Batch(prompts=tuple(np.arange(prompt) + 3 for _ in range(prompts)), rollouts=tuple(rollouts))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 90), st.integers(1, 90), st.integers(1, 2000))
def test_the_largest_micro_batch_is_that_of_packing(
    prompts: int, size: int, prompt: int, length: int, budget: int
) -> None:
    config = build(
        {
            "training": {
                "group_size": size,
                "max_tokens": length,
                "max_prompt_tokens": prompt,
                "micro_batch_tokens": budget,
            }
        }
    )
    batch = full_batch(prompts, size, prompt, length)
    device = torch.device("cpu")
    micros = packing.pack(batch, range(prompts * size), budget=budget, share_prompts=True, pad_id=0, device=device)
    largest = max(micro.tokens_RS.numel() for micro in micros)
    widest = max(micro.tokens_RS.shape[1] for micro in micros)
    found = work.micro_batches(config, prompts)
    # Rows of two widths may go together, padded; the estimate takes those of one.
    assert max(rows.tokens for rows in found) <= max(budget, prompt + length)
    assert widest == max(rows.width for rows in found)
    assert largest <= 2 * max(rows.tokens for rows in found)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_what_autograd_saves(dtype: str, checkpointing: bool) -> None:
    config = build(
        {
            "model": {"model": "builtin:tiny", "lora_rank": 16},
            "backend": {"devices": "cpu"},
            "training": {"gradient_checkpointing": checkpointing, "dtype": dtype},
        }
    )
    backend = LocalBackend(config, seed=1, say=lambda line: None)
    policy = backend.policy
    (micro,) = packing.pack(
        full_batch(2, 4, 16, 32), range(8), budget=4096, share_prompts=True, pad_id=0, device=policy.device
    )
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    policy.peft.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = policy.hidden(micro.tokens_RS, micro.positions_RS, micro.mask)
    for parameter in policy.peft.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    assert states.requires_grad
    shape = shape_of_tiny()
    rows = work.Rows(*micro.tokens_RS.shape, trained=len(micro.targets_N), shared=micro.mask is not None)
    arguments = {"item": 4 if dtype == "fp32" else 2, "rank": 16, "targets": shape.linears, "dropout": False}
    whole = activations(shape, rows, checkpointing=False, **arguments)
    last = rows.tokens * shape.hidden * 4  # what the last norm reads, in float32: the estimate's hidden states
    if checkpointing:  # nothing but the inputs of the blocks is there after the forward pass
        inputs = rows.tokens * shape.layers * shape.hidden * arguments["item"]
        assert sum(saved.values()) == pytest.approx(inputs + last, rel=0.05)
        assert activations(shape, rows, checkpointing=True, **arguments) < whole
    else:
        assert sum(saved.values()) == pytest.approx(whole + last, rel=0.05)


def shape_of_tiny() -> estimate.ModelShape:
    model_config = estimate.find_model_config("builtin:tiny")
    assert model_config is not None
    shape = estimate.shape_of(model_config)
    assert shape is not None
    return shape


# ---- published shapes, for docs/scaling.md


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_the_parameters_they_are_published_with(name: str) -> None:
    published = {
        "Qwen3-0.6B": 596_049_920,
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
        "Qwen3-14B": 14_768_307_200,
        "Qwen3-32B": 32_762_123_264,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.3-70B": 70_553_706_496,
    }
    assert MODELS[name].parameters == published[name]


def test_a_larger_model_needs_more() -> None:
    small, large = (processes(shape)[0].peak_bytes for shape in (SHAPE, replace(SHAPE, layers=6)))
    assert small < large
