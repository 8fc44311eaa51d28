"""The peak memory of a run: of each process what stays, and what its phases take beside it. A peak is a maximum over
phases, not a sum. Lengths are taken to be what the config allows at most.

On a CPU it is the resident memory of the whole process, as `peak_memory_bytes` in metrics.jsonl; on a GPU what is
allocated on the device. benchmarks/memory.py measures how far it is from the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from retrain.config import Config
from retrain.estimate.activations import activations
from retrain.estimate.shape import ModelShape
from retrain.estimate.work import ITEM_BYTES, Rows, base_dtype, micro_batches, prompt_tokens, tokens_per_step

MIB = 2**20
FP32 = 4
# Elements of [N, V] that retrain_kernels.linear_logprob holds at a time: on a CPU in two float32 buffers, in the Triton
# kernels in the model's number format.
CPU_LOGITS_ELEMENTS = 2**19
GPU_LOGITS_ELEMENTS = 2**26
# A process on a CPU with torch, transformers and PEFT loaded and used once, before its model (Linux, torch 2.13).
PROCESS_BYTES = 560 * MIB
# What a training step on a CPU leaves resident per byte that it needs at once: glibc finds no use for most of the gaps
# between aligned blocks. Measured 1.8 to 3.5 (docs/experiments.md); a GPU's allocator is counted by what is allocated.
CPU_SLACK = 2.2
CACHE_BYTES = {"bf16": 2, "fp8": 1}
# Blocks that FSDP holds whole: the one in use, and the next, which is being fetched.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class Part:
    """A tensor, or a group of them. how: what its size follows from."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Phase:
    """What a process holds for a while, beside what it keeps."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Process:
    """count: how many like it there are, each on a device of its own. kept: what stays from step to step."""

    name: str
    device: str
    count: int
    kept: tuple[Part, ...]
    phases: tuple[Phase, ...]

    @property
    def kept_bytes(self) -> int:
        return sum(part.bytes for part in self.kept)

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak_bytes(self) -> int:
        return self.kept_bytes + self.peak_phase.bytes


def processes(config: Config, shape: ModelShape, nproc: int = 1, *, one_device: bool = False) -> list[Process]:
    """The processes of a run; none where a service trains. nproc: that share out each step among them. one_device: it
    has the first alone, because a campaign shares its devices out."""
    if config.backend.backend != "local":
        return []
    devices = [name.strip() for name in config.backend.devices.split(",")]
    devices = devices[:1] if one_device else devices
    samples_here = config.inference.engine == "pytorch"
    if len(devices) > 1 and samples_here:
        sampler = _process(config, shape, "sampler", devices[0], samples=True, trains=False)
        return [sampler, _process(config, shape, "trainer", devices[-1], samples=False, trains=True)]
    return [_process(config, shape, "run", devices[-1], samples=samples_here, trains=True, nproc=nproc)]


def peak_bytes(config: Config, shape: ModelShape, nproc: int = 1) -> int:
    """Of the largest process."""
    return max((process.peak_bytes for process in processes(config, shape, nproc)), default=0)


@dataclass(frozen=True)
class _Place:
    """Where a process runs and what of the model it holds. fused: decoding from a merged copy of the weights."""

    config: Config
    shape: ModelShape
    cpu: bool
    dtype: str
    prompts: int
    sharded: bool
    fused: bool

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def sampling_item(self) -> int:
        return ITEM_BYTES.get(self.config.inference.dtype, self.item) if self.fused else self.item

    @property
    def completions(self) -> int:
        return self.prompts * self.config.training.group_size

    @property
    def gathered(self) -> tuple[Part, ...]:
        if not self.sharded:
            return ()
        size = GATHERED_BLOCKS * self.shape.block * self.item
        return (Part("gathered layers", size, f"{GATHERED_BLOCKS} transformer blocks, whole"),)


def _process(
    config: Config, shape: ModelShape, name: str, device: str, *, samples: bool, trains: bool, nproc: int = 1
) -> Process:
    sharded = config.backend.sharding == "fsdp" and nproc > 1
    place = _Place(
        config,
        shape,
        cpu=device == "cpu",
        dtype=base_dtype(config, device),
        prompts=math.ceil(tokens_per_step(config)["prompts"] / nproc),
        sharded=sharded,
        fused=config.inference.merged_copy and config.backend.sharding == "none",
    )
    kept = [Part("process", PROCESS_BYTES, "Python, torch and transformers")] if place.cpu else []
    kept += [_base(place, nproc), *_adapter(place, trains=trains)]
    phases = []
    if samples:
        kept += _copies(place, staged=0 if trains else config.training.max_staleness)
        phases += [Phase("sampling", (*_sampling(place), *place.gathered)), Phase("publishing", _publishing(place))]
    if trains:
        phases.append(max((_training(place, rows) for rows in micro_batches(config, place.prompts)), key=_bytes))
    return Process(name, device, nproc, tuple(kept), tuple(phases))


def _bytes(phase: Phase) -> int:
    return phase.bytes


def _base(place: _Place, nproc: int) -> Part:
    shape, share = place.shape, nproc if place.sharded else 1
    blocks = shape.layers * shape.block
    held = math.ceil(blocks / share) + shape.parameters - blocks
    how = f"{shape.parameters:,} parameters, {place.dtype}, frozen"
    return Part("base weights", held * place.item, how + (f", blocks shared by {share}" if share > 1 else ""))


def _adapter(place: _Place, *, trains: bool) -> list[Part]:
    config = place.config
    count = place.shape.lora_parameters(config.model.lora_rank, config.lora.target_modules)
    weights = Part("LoRA weights", count * FP32, f"{count:,} parameters, fp32")
    if not trains:
        return [weights]
    parts = [
        weights,
        Part("LoRA gradients", count * FP32, "fp32"),
        Part("Adam state", 2 * count * FP32, "two moments, fp32"),
    ]
    if config.loss.epochs * config.loss.minibatches > 1:
        parts.append(Part("step's beginning", 3 * count * FP32, "adapter and moments, to take a step back to"))
    return parts


def _copies(place: _Place, *, staged: int) -> list[Part]:
    """The weights that sample. The embedding is shared with the base, and where nothing is laid out anew for oneDNN, so
    is what has no adapter."""
    config, shape, item = place.config, place.shape, place.sampling_item
    parts = []
    if place.fused:
        targets = shape.targets(config.lora.target_modules)
        whole = place.cpu or item != place.item
        names = shape.linears if whole else targets
        count = shape.layers * sum(a * b for a, b in (shape.linears[name] for name in names))
        count += (shape.embedding if whole else 0) + (shape.embedding if item != place.item else 0)
        parts.append(Part("merged copy", count * item, f"{count:,} weights with the adapter merged in"))
    if staged:
        adapter = shape.lora_parameters(config.model.lora_rank, config.lora.target_modules)
        parts.append(Part("staged versions", staged * adapter * FP32, f"{staged} adapters that wait to be used"))
    return parts


def _sampling(place: _Place) -> tuple[Part, ...]:
    """The keys and values, and the larger of the prefill and one decoding step beside them."""
    config, shape, item = place.config, place.shape, place.sampling_item
    prompt, new, rows = prompt_tokens(config), config.training.max_tokens, place.completions
    # The fused decoder keeps a prompt once for its group, transformers' cache once for each completion.
    prompts = place.prompts if config.inference.prefix_caching else rows
    cached = (prompts if place.fused else rows) * prompt + rows * new
    cache_item = CACHE_BYTES.get(config.inference.kv_cache_dtype, item)
    layer = 2 * shape.keys * cached
    # Buffers grow a layer at a time; attention is computed in float32, from copies where the cache is narrower.
    step = layer * cache_item + (layer * FP32 if cache_item < FP32 and place.fused else 0)
    step += 0 if place.fused else 2 * shape.queries * rows * (prompt + new) * item
    step += 2 * rows * shape.heads * (prompt + new) * FP32
    prefill = prompts * prompt * (3 * shape.intermediate + 3 * shape.hidden + 2 * (shape.queries + shape.keys)) * item
    # Logits, divided by the temperature, and probabilities; in float32, beside those of the model where it is narrower.
    numbers = rows * shape.vocab * (3 * FP32 + (item if item < FP32 else 0))
    return (
        Part(
            "KV cache",
            shape.layers * layer * cache_item,
            f"{rows} completions x ({prompt} prompt + {new} new tokens)"
            + (", a prompt once a group" if place.fused and config.inference.prefix_caching else ""),
        ),
        Part("decoding step", max(prefill, step), "prefill or attention of one layer, whichever is larger"),
        Part("next-token logits", numbers, f"{rows} x {shape.vocab:,}, with their probabilities"),
    )


def _publishing(place: _Place) -> tuple[Part, ...]:
    if not place.fused:
        return place.gathered
    targets = place.shape.targets(place.config.lora.target_modules).values()
    largest = max((a * b for a, b in targets), default=0)
    joined = 2 * place.shape.hidden * place.shape.intermediate
    size = 3 * largest * FP32 + 2 * joined * place.sampling_item
    return (Part("merging", size, "the largest layer, in float32, and its new weights beside the old"),)


def _training(place: _Place, rows: Rows) -> Phase:
    config, shape, training = place.config, place.shape, place.config.training
    needed = activations(
        shape,
        rows,
        item=place.item,
        checkpointing=training.gradient_checkpointing,
        rank=config.model.lora_rank,
        targets=shape.targets(config.lora.target_modules),
        dropout=config.lora.dropout > 0,
    )
    block = 2 * CPU_LOGITS_ELEMENTS * FP32 if place.cpu else GPU_LOGITS_ELEMENTS * place.item
    logits = min(block, rows.trained * shape.vocab * FP32)
    # Final hidden states of all tokens, those that are trained on, and the gradient of their log-probs.
    states = (rows.tokens * FP32 + rows.trained * (place.item + FP32)) * shape.hidden
    again = "re" if training.gradient_checkpointing else "not re"
    parts = [
        Part("activations", needed, f"{rows.count} rows of {rows.width:,} tokens a micro-batch, {again}computed"),
        Part("logits block", logits, "the part held at a time"),
        Part("hidden states", states, f"{rows.trained:,} tokens with a loss, their states and the gradient of these"),
        *place.gathered,
    ]
    if place.cpu:
        slack = int((CPU_SLACK - 1) * sum(part.bytes for part in parts))
        parts.append(Part("allocator", slack, f"gaps that glibc keeps: measured, {CPU_SLACK:g} x what is needed"))
    return Phase("training", tuple(parts))


def largest_logits(config: Config, shape: ModelShape) -> Part:
    """What a trainer that computes all logits at once would hold, and this one never does."""
    rows = min(config.training.micro_batch_tokens, tokens_per_step(config)["completion_tokens"])
    return Part("logits [N, V]", rows * shape.vocab * FP32, f"{rows:,} x {shape.vocab:,} fp32")
