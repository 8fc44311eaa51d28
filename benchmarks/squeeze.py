"""Squeezing one large layer: from its thin factors, and as PEFT converts an adapter to another rank.

    OMP_NUM_THREADS=1 python benchmarks/squeeze.py

Contenders get the same LoRA layer of a plain linear module, its weights as they are in the adapter's file:
    retrain           spectrum and truncation, as `retrain squeeze` computes them (float64, B A never formed)
    peft              `peft.convert_to_lora` (a dense SVD of dW, float32)
    torch.svd_lowrank a randomised SVD of dW (float32, two power iterations)
Error: squared Frobenius distance of the new s B A from the old, relative to the old, in float64. The least possible is
1 - V(rank). Exit status 0 only where retrain's error is not above PEFT's (but for rounding) and the target is met.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, convert_to_lora, get_peft_model
from rounds import clock, ratio, write
from torch import Tensor, nn

from retrain.squeeze.lowrank import decompose, retained, truncate

Factors = tuple[Tensor, Tensor]


TARGET = 20  # times as fast as PEFT
ROUNDING = 1e-9  # of float32 factors, in an error


def main() -> int:
    options = arguments()
    torch.manual_seed(0)
    model, b_OR, a_RI = adapted_layer(options.outputs, options.inputs, options.source_rank)
    contenders: dict[str, Callable[[], Factors]] = {
        "retrain": lambda: squeezed(b_OR, a_RI, options.rank),
        "torch.svd_lowrank": lambda: randomised(b_OR, a_RI, options.rank),
        "peft": lambda: converted(model, options.rank),
    }
    least = 1 - retained(decompose(b_OR[None], a_RI[None]).values_ER)[options.rank - 1].item()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, squeeze in contenders.items():
            start = clock()
            factors = squeeze()
            seconds[name].append(clock() - start)
            errors[name] = relative_error((b_OR, a_RI), factors)
    print(
        f"{options.outputs} x {options.inputs}, rank {options.source_rank} to {options.rank}; least error {least:.9f}"
    )
    for name in contenders:
        faster = ratio(seconds[name], seconds["retrain"])
        above = errors[name] - least
        print(f"{name:18} {min(seconds[name]):9.3f} s   {faster:8.1f}x retrain's time   error - least {above:+.1e}")
    times = {name: [round(value, 4) for value in values] for name, values in seconds.items()}
    write(options.json, {"options": vars(options), "seconds": times, "errors": errors, "least_error": least})
    met = ratio(seconds["peft"], seconds["retrain"]) >= TARGET
    return 0 if met and errors["retrain"] <= errors["peft"] + ROUNDING else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=2560)
    parser.add_argument("--inputs", type=int, default=9728)
    parser.add_argument("--source-rank", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def adapted_layer(outputs: int, inputs: int, rank: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear layer with an adapter whose scale is 1, and its factors; the singular values fall by half every 8."""
    model = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False)}),  # pyright: ignore[reportArgumentType]
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"]),
    )
    layer = model.get_submodule("base_model.model.layer")
    b_OR = torch.randn(outputs, rank) * 0.01 * 0.5 ** (torch.arange(rank) / 8)
    layer.lora_B["default"].weight.data = b_OR  # pyright: ignore
    return model, b_OR, layer.lora_A["default"].weight.detach()  # pyright: ignore


@torch.no_grad()
def squeezed(b_OR: Tensor, a_RI: Tensor, rank: int) -> Factors:
    parts = decompose(b_OR[None], a_RI[None])
    retained(parts.values_ER)
    small = truncate(parts, rank)
    return small.b_EOK[0].float(), small.a_EKI[0].float()


@torch.no_grad()
def randomised(b_OR: Tensor, a_RI: Tensor, rank: int) -> Factors:
    u, s, v = torch.svd_lowrank(b_OR @ a_RI, q=rank + 8, niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].mT


def converted(model: nn.Module, rank: int) -> Factors:
    with warnings.catch_warnings():
        # That it is LoRA already, which is the point.
        warnings.filterwarnings("ignore", message="Converting a PEFT adapter")
        _, state = convert_to_lora(model, rank=rank)
    factors = {key.rsplit(".", 2)[-2]: value for key, value in state.items()}
    return factors["lora_B"], factors["lora_A"]


def relative_error(old: Factors, new: Factors) -> float:
    """Of (b, a) pairs, without forming a product: the norm of b a is that of its core."""
    b = torch.cat((old[0].double(), -new[0].double()), dim=1)
    a = torch.cat((old[1].double(), new[1].double()))
    return (squared_norm(b, a) / squared_norm(old[0].double(), old[1].double())).item()


def squared_norm(b: Tensor, a: Tensor) -> Tensor:
    return ((b.mT @ b) * (a @ a.mT)).sum()


if __name__ == "__main__":
    sys.exit(main())
