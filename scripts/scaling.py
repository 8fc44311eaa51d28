"""The tables of docs/scaling.md: published models, by the estimator of `retrain explain`. All of it is arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from retrain import estimate
from retrain.config import Config, build

GIB = 2**30
RANK = 32
RANKS = 8
# The run that the tables are about; everything else has its default.
RUN = {
    "training": {"max_prompt_tokens": 512, "max_tokens": 2048, "batch_size": 8, "group_size": 16},
    "model": {"lora_rank": RANK},
}
# Bytes of memory, and the share of it that a run may take: the rest is for fragments, CUDA and its libraries.
CARDS = {"H200": 141e9, "H100": 80e9, "24 GiB": 24 * GIB}
USABLE = 0.9
# Bytes a second. H200: its memory. PCIe 5.0 x16 and NVLink 4 in one direction, as reached rather than as printed.
MEMORY_RATE = 4.8e12
LINKS = {"25 Gbit/s Ethernet": 3e9, "PCIe 5.0 x16": 50e9, "NVLink 4": 400e9}
# Dense bf16 products of an H200 or H100, and the share of them that training reaches.
PEAK_FLOPS, REACHED = 989e12, 0.4
# Of a weight and a token: forward, again where activations are recomputed, and the gradient of the input. The weights
# are frozen, so their own gradient, another 2, is not computed.
FORWARD = BACKWARD = 2


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool = False) -> estimate.ModelShape:
    return estimate.ModelShape(hidden, layers, heads, 8, 128, intermediate, 151_936, tied, qk_norm=True)


def _llama(hidden: int, layers: int, heads: int, intermediate: int) -> estimate.ModelShape:
    return estimate.ModelShape(hidden, layers, heads, 8, 128, intermediate, 128_256, tied=False)


# As published; a test holds their parameter counts to the published ones.
MODELS = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288),
    "Llama-3.1-8B": _llama(4096, 32, 32, 14336),
    "Qwen3-14B": _qwen3(5120, 40, 40, 17408),
    "Qwen3-32B": _qwen3(5120, 64, 64, 25600),
    "Llama-3.3-70B": _llama(8192, 80, 64, 28672),
}


def config(**keys: str | int) -> Config:
    return build(RUN, {"backend.devices": "gpu:0"} | {key.replace("__", "."): value for key, value in keys.items()})


def set_ups(shape: estimate.ModelShape) -> dict[str, int]:
    """Peak bytes of each process of each set-up."""
    (plain,) = estimate.processes(config(), shape)
    sampler, trainer = estimate.processes(config(backend__devices="gpu:0,gpu:1"), shape)
    (sharded,) = estimate.processes(config(backend__sharding="fsdp"), shape, RANKS)
    return {
        "one device": plain.peak_bytes,
        "split, sampler": sampler.peak_bytes,
        "split, trainer": trainer.peak_bytes,
        f"FSDP over {RANKS}, each": sharded.peak_bytes,
    }


def memory_table() -> str:
    rows = []
    for name, shape in MODELS.items():
        (plain,) = estimate.processes(config(), shape)
        kept = {part.name: part.bytes for part in plain.kept}
        adapter = kept["LoRA weights"] + kept["LoRA gradients"] + kept["Adam state"]
        training = next(phase for phase in plain.phases if phase.name == "training")
        activations = next(part.bytes for part in training.parts if part.name == "activations")
        cached = 2 * shape.layers * shape.keys * 2
        sizes = [kept["base weights"], adapter, activations, *set_ups(shape).values()]
        one, *others = map(_gib, sizes)
        rows.append([name, one, others[0], f"{cached / 1024:.0f} KiB", *others[1:]])
    head = ["model", "base, bf16", f"adapter, rank {RANK}", "KV cache a token", "activations"]
    return _table([*head, *set_ups(next(iter(MODELS.values())))], rows)


def cards_table() -> str:
    rows = [
        [name, *(_fits(set_ups(shape), size * USABLE) for size in CARDS.values())] for name, shape in MODELS.items()
    ]
    return _table(["model", *CARDS], rows)


def _fits(peaks: dict[str, int], limit: float) -> str:
    one, sampler, trainer, sharded = peaks.values()
    if one <= limit:
        return "1"
    if max(sampler, trainer) <= limit:
        return "2, split"
    if trainer <= limit:
        return "1 to train, servers sample"
    return f"{RANKS}, FSDP" if sharded <= limit else f"more than {RANKS}, or fewer tokens at a time"


def rates_table() -> str:
    """Seconds for one step of RUN: to publish, to sample and to train."""
    rows = []
    step = estimate.tokens_per_step(config())
    tokens = step["prompt_tokens"] + step["completion_tokens"]
    for name, shape in MODELS.items():
        adapter = shape.lora_parameters(RANK, "all-linear") * 4
        read = 2 * (shape.parameters - (0 if shape.tied else shape.embedding))
        context = estimate.prompt_tokens(config()) + config().training.max_tokens / 2
        cache = step["completions"] * context * 2 * shape.layers * shape.keys * 2
        sampling = config().training.max_tokens * (read + cache) / MEMORY_RATE
        weights = shape.layers * sum(a * b for a, b in shape.linears.values()) + shape.embedding
        training = (2 * FORWARD + BACKWARD) * weights * tokens / (PEAK_FLOPS * REACHED)
        publishing = [f"{adapter / rate:.2g} s" for rate in LINKS.values()]
        alone = f"{MEMORY_RATE / read:,.0f}"
        rows.append([name, _mib(adapter), *publishing, alone, f"{sampling:,.0f} s", f"{training:,.0f} s"])
    head = ["model", "adapter", *LINKS, "tokens/s, one sequence", "sampling a step", "training a step"]
    return _table(head, rows)


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}" if count < 100 * GIB else f"{count / GIB:.0f}"


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


BLOCKS = {"memory": memory_table, "cards": cards_table, "rates": rates_table}
