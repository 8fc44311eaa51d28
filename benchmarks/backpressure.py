"""The batch-size controller beside a fixed batch, doubling until slower, and AIMD, on simulated machines.

    OMP_NUM_THREADS=1 python benchmarks/backpressure.py

Prints the tables of docs/backpressure.md: share of throughput lost to an oracle, and steps until it stays within 10% of
the oracle's. Then 500 seeds of machines with kappa > 0: how far the batch size ever moves back once it has converged.
Exit status 0 only where that is at most one prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from statistics import mean, median

from retrain.backpressure.simulation import POLICIES, Machine, Trace, simulate
from retrain.backpressure.usl import Usl
from retrain.streams import generator, stream_key

STEPS = 200
# From here on a run of the second table counts as converged: warm-up and as many steps as a moving average needs.
CONVERGED = 50

MACHINES = {
    "linear": Machine(((0, Usl(50, 0, 0)),)),
    "queueing (sigma 0.05)": Machine(((0, Usl(50, 0.05, 0)),)),
    "retrograde, p* 576": Machine(((0, Usl(50, 0.002, 3e-6)),)),
    "retrograde, p* 313": Machine(((0, Usl(50, 0.02, 1e-5)),)),
    "retrograde, p* 98": Machine(((0, Usl(50, 0.03, 1e-4)),)),
    "retrograde, p* 313, noise 15%": Machine(((0, Usl(50, 0.02, 1e-5)),), noise=0.15),
    "retrograde, p* 313, drift 2% a step": Machine(((0, Usl(50, 0.02, 1e-5)),), drift=0.02),
    "p* 313, from step 100 on 98": Machine(((0, Usl(50, 0.02, 1e-5)), (100, Usl(50, 0.03, 1e-4)))),
    "p* 98, from step 100 on 313": Machine(((0, Usl(50, 0.03, 1e-4)), (100, Usl(50, 0.02, 1e-5)))),
}
LABELS = {"adaptive": "backpressure", "fixed": "fixed at 8", "doubling": "doubling", "aimd": "AIMD"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="seeds of each cell of the tables")
    parser.add_argument("--oscillation-seeds", type=int, default=500)
    args = parser.parse_args(argv)
    print("\n".join(table(args.seeds)))
    traces = [trace(seed) for seed in range(args.oscillation_seeds)]
    swings = [one.swing(CONVERGED) for one in traces]
    still = sum(len(set(one.sizes_S[CONVERGED:])) == 1 for one in traces)
    lost = [1 - float(one.shares_S[CONVERGED:].mean()) for one in traces]
    print(f"\nkappa > 0, {len(traces)} seeds, steps {CONVERGED} to {len(traces[0].sizes_S)}:")
    print(f"largest move back {max(swings)} prompts; {still} runs do not move at all")
    print(f"throughput lost to the best size: mean {100 * mean(lost):.1f}%, worst {100 * max(lost):.1f}%")
    return 0 if max(swings) <= 1 else 1


def table(seeds: int) -> Iterator[str]:
    yield f"{STEPS} steps of 1 to 64 prompts x 16, noise 5% unless said; {seeds} seeds: mean lost, median settled"
    yield ""
    yield f"| machine | {' | '.join(LABELS[name] for name in POLICIES)} |"
    yield f"|---|{'---|' * len(POLICIES)}"
    for label, machine in MACHINES.items():
        cells = []
        for policy in POLICIES.values():
            traces = [simulate(policy, machine, steps=STEPS, seed=seed) for seed in range(seeds)]
            settled = median(one.settled() for one in traces)
            after = "never" if settled >= STEPS else f"{settled:g}"
            cells.append(f"{100 * mean(one.regret for one in traces):.1f}%, {after}")
        yield f"| {label} | {' | '.join(cells)} |"


def trace(seed: int) -> Trace:
    """The controller on a random machine."""
    return simulate(POLICIES["adaptive"], random_machine(seed), steps=120, seed=seed)


def random_machine(seed: int) -> Machine:
    """kappa > 0, p* from 64 to 1024 completions, sigma up to 0.1, noise 1% to 5%."""
    rng = generator(stream_key(seed, "machine"))
    sigma, peak, noise = rng.uniform(0, 0.1), 2 ** rng.uniform(6, 10), rng.uniform(0.01, 0.05)
    return Machine(((0, Usl(50.0, sigma, (1 - sigma) / peak**2)),), noise=noise)


if __name__ == "__main__":
    sys.exit(main())
