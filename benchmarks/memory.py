"""The estimate of `retrain explain` beside the peak memory of real runs, each in a fresh process.

python benchmarks/memory.py [CASE ...]    without names: all that this machine has the model and the device for
python benchmarks/memory.py --json

The model of the cases `tiny-*` is builtin:tiny with another end-of-sequence token, which it never writes, so that every
completion is as long as it may be. Temperature 3 does the same for SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain import estimate
from retrain.assets import resolve_model
from retrain.config import Config, dump_toml, load_config

REPOSITORY = Path(__file__).parents[1]
STEPS = 2
ENDLESS = "endless"
SMOLLM2 = "models/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Case:
    """A run: a config of this repository with other values. gpu: it needs one."""

    config: str
    values: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False


def _tiny(**training: Any) -> Case:
    values = {"model.model": ENDLESS, "training.max_prompt_tokens": 13}
    return Case("configs/quickstart.toml", values | {f"training.{key}": value for key, value in training.items()})


def _smollm2(**training: Any) -> Case:
    values = {"model.model": SMOLLM2, "training.max_prompt_tokens": 50, "training.temperature": 3.0}
    return Case("configs/smollm2.toml", values | {f"training.{key}": value for key, value in training.items()})


CASES = {
    "tiny-quickstart": _tiny(),
    "tiny-checkpointing": _tiny(gradient_checkpointing=True, micro_batch_tokens=2048),
    "tiny-long": _tiny(batch_size=32, group_size=16, max_tokens=256),
    "tiny-large": _tiny(batch_size=64, group_size=32, max_tokens=128),
    "tiny-wide": _tiny(batch_size=16, group_size=32, max_tokens=128, micro_batch_tokens=65536),
    "smollm2": _smollm2(),
    "smollm2-checkpointing": _smollm2(batch_size=1, group_size=8, max_tokens=48, gradient_checkpointing=True),
    # On a GPU, weights, copy and cache of this one take some 14 GiB: a tenth of an H200.
    "gpu-qwen3-4b": Case(
        "configs/quickstart.toml",
        {
            "model.model": "Qwen/Qwen3-4B-Instruct-2507",
            "backend.devices": "gpu:0",
            "data.source": "arithmetic:words",
            "training.max_prompt_tokens": 64,
            "training.temperature": 3.0,
            "training.max_tokens": 512,
            "training.gradient_checkpointing": True,
        },
        gpu=True,
    ),
}


def endless_model(folder: Path) -> Path:
    """A copy of builtin:tiny that takes its padding for the end, which it never writes."""
    shutil.copytree(resolve_model("builtin:tiny"), folder)
    for name, key in (("config.json", "eos_token_id"), ("generation_config.json", "eos_token_id")):
        _edit(folder / name, {key: 0})
    _edit(folder / "tokenizer_config.json", {"eos_token": "<|pad|>"})
    return folder


def _edit(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def config_of(case: Case, scratch: Path) -> Config:
    values = dict(case.values)
    if values["model.model"] == ENDLESS:
        values["model.model"] = str(endless_model(scratch / ENDLESS))
    elif not case.gpu:
        values["model.model"] = str(REPOSITORY / values["model.model"])
    values |= {"training.max_steps": STEPS, "algorithm.skip_uniform_groups": False}
    return load_config(REPOSITORY / case.config, values | {"logging.log_dir": str(scratch / "run")})


def compare(case: Case) -> dict[str, float]:
    """Bytes estimated and measured, their ratio, and the share of completions that reached max_tokens."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case, Path(folder))
        model_config = estimate.find_model_config(config.model.model)
        shape = estimate.shape_of(model_config) if model_config else None
        assert shape is not None, f"{config.model.model}: no config.json here"
        rows = run(config, Path(folder))
    expected, measured = estimate.peak_bytes(config, shape), rows[-1]["peak_memory_bytes"]
    full = min(row["max_token_hit_rate"] for row in rows)
    return {"estimate": expected, "measured": measured, "ratio": expected / measured, "full_length": full}


def run(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The metrics of the real command."""
    path = folder / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "retrain", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description="The estimate of explain beside measured peak memory.")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all that can run here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = {}
    for name in options.cases or [name for name, case in CASES.items() if can_run(case)]:
        found[name] = one = compare(CASES[name])
        if not options.json:
            estimated, measured = one["estimate"] / 2**20, one["measured"] / 2**20
            print(
                f"| {name} | {estimated:,.0f} | {measured:,.0f} | {one['ratio']:.2f} | {one['full_length']:.0%} |",
                flush=True,
            )
    if options.json:
        print(json.dumps(found, indent=2))
    return 0


def can_run(case: Case) -> bool:
    if case.gpu:
        import torch

        return torch.cuda.is_available()
    model = case.values["model.model"]
    return model == ENDLESS or (REPOSITORY / model / "config.json").is_file()


if __name__ == "__main__":
    sys.exit(main())
