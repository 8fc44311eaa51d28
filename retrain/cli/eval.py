"""`retrain eval CONFIG [--adapter DIR]`: pass@1 and pass@k on held-out examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from retrain.cli.flags import parse
from retrain.redact import shown
from retrain.tracking.console import percent
from retrain.types import ConfigError, RetrainError


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "eval")
    config = parsed.load()
    adapter = parsed.options["adapter"]
    if adapter and not Path(adapter, "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter}: no adapter in that folder (there is no adapter_config.json)")
    from retrain.training.heldout import evaluate_adapter

    say = _quiet if parsed.options["json"] else _say
    result = evaluate_adapter(config, Path(adapter) if adapter else None, say=say)
    if not result.pass_at:
        raise RetrainError(f"none of the {result.errors} completions could be scored: there is no rate to report")
    if parsed.options["json"]:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return 0
    print(f"{result.examples} held-out examples x {result.samples} samples, {result.mean_tokens:.1f} tokens on average")
    for k, estimate in result.pass_at.items():
        print(f"pass@{k}: {percent(estimate.value)} (95% {percent(estimate.low)} to {percent(estimate.high)})")
    if result.errors:
        print(f"{result.errors} completions could not be scored and are left out")
    return 0


def _say(line: str) -> None:
    print(shown(line))


def _quiet(line: str) -> None:
    pass
