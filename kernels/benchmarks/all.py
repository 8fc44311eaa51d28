"""Every benchmark at the shapes of its targets, and compute-sanitizer over the kernels where it is installed.

    python kernels/benchmarks/all.py results --require

Writes one JSON file a benchmark into the folder. With --require the exit status is 0 only where every check passed and
every target was met. Flags that all benchmarks have (--rounds, --device, --threads) may follow the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("linear_logprob", "token_advantages", "policy_loss", "training_step")
# Small and odd, so that the ends of tiles are met; what is sanitized are the kernels alone.
SANITIZED = {
    "linear_logprob": "--rows 257 --hidden 96 --vocab 1031",
    "token_advantages": "--tokens 5003 --completions 37",
    "policy_loss": "--tokens 5003 --completions 37",
}
TOOLS = ("memcheck", "racecheck")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the JSON files go")
    args, passed_on = parser.parse_known_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        if run(script(name, *passed_on, "--json", str(args.folder / f"{name}.json"))):
            failed.append(name)
    failed += sanitize(args.folder / "sanitizer.json")
    print(f"== failed: {', '.join(failed)}" if failed else "== all passed")
    return 1 if failed else 0


def sanitize(record: Path) -> list[str]:
    """Run compute-sanitizer over the kernels; returns what failed. Where it cannot run, the record says so."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or not torch.cuda.is_available():
        reason = "no GPU" if sanitizer else "compute-sanitizer is not on PATH"
        print(f"== compute-sanitizer: not run, {reason}")
        record.write_text(json.dumps({"not_run": reason}, indent=2) + "\n", encoding="utf-8")
        return []
    statuses = {}
    for tool in TOOLS:
        for name, shape in SANITIZED.items():
            print(f"== {tool} {name}", flush=True)
            command = script(name, *shape.split(), "--only", "ours", "--rounds", "1", "--warmup", "1")
            # Torch's cache would hide an access beyond a tensor from memcheck: it stays inside the cached block.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            statuses[f"{tool} {name}"] = run([sanitizer, "--tool", tool, "--error-exitcode", "86", *command], uncached)
    record.write_text(json.dumps({"exit_status": statuses}, indent=2) + "\n", encoding="utf-8")
    return [name for name, status in statuses.items() if status]


def script(name: str, *flags: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *flags]


def run(command: list[str], extra: dict[str, str] | None = None) -> int:
    """Exit status of a command that finds the packages of this tree, installed or not."""
    paths = [str(HERE.parents[1]), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (extra or {})
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
