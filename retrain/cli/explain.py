"""`retrain explain`: what a config means, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from retrain import estimate
from retrain.cli.flags import Parsed, main_flag, parse
from retrain.config import (
    DEFAULT_PATH,
    KEYS,
    SECTIONS,
    Config,
    Run,
    changed,
    run_kind,
    run_matrix,
    to_dict,
    unavailable,
    value_of,
    without_effect,
    without_effect_in_campaign,
)
from retrain.config.show import show, show_key

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def run(argv: list[str]) -> int:
    parsed = parse(argv, "explain")
    facts = explain(parsed.load(), parsed)
    if parsed.options["json"]:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(facts, parsed)
    return 0


def explain(config: Config, parsed: Parsed) -> dict[str, Any]:
    """Everything `retrain explain` says, as plain values."""
    plain, matrix = to_dict(config), run_matrix(config)
    missing = not_available(config, matrix)
    model_config = estimate.find_model_config(config.model.model)
    shape = estimate.shape_of(model_config) if model_config is not None else None
    return {
        "file": parsed.config_path or DEFAULT_PATH,
        "kind": run_kind(config),
        "config": plain,
        "changed": {path: plain[KEYS[path].section][KEYS[path].name] for path in changed(config)},
        "no_effect": _without_effect(config, matrix, missing),
        "not_available": missing,
        "runs": [
            {
                "name": one.name,
                "condition": one.condition,
                "seed": one.seed,
                "max_steps": one.config.training.max_steps,
                "changed": _differences(config, one.config),
            }
            for one in matrix
        ],
        "tokens_per_step": estimate.tokens_per_step(config),
        "model": _model_line(config, model_config, shape),
        "sizes": [asdict(size) for size in estimate.sizes(config, shape)] if shape is not None else None,
    }


def not_available(config: Config, matrix: tuple[Run, ...]) -> list[str]:
    """What keeps the config, or any run of its campaign, from running in this version."""
    return list(dict.fromkeys(line for one in (config, *_configs(matrix)) for line in unavailable(one)))


def _configs(matrix: tuple[Run, ...]) -> list[Config]:
    return [one.config for one in matrix]


def _without_effect(config: Config, matrix: tuple[Run, ...], missing: list[str]) -> list[str]:
    """In a campaign, what changes nothing in any run; what is not available is said already."""
    said = {_key_of(line) for line in missing}
    idle = without_effect_in_campaign(config, _configs(matrix)) if matrix else without_effect(config)
    return [line for line in idle if _key_of(line) not in said]


def _key_of(line: str) -> str:
    return line.partition(" = ")[0]


def _differences(config: Config, run_config: Config) -> dict[str, Any]:
    """What a run of a campaign has other than the file's own sections say."""
    keys = [key for key in KEYS.values() if getattr(run_config, key.section) is not None]
    values = {key.path: value_of(run_config, key) for key in keys}
    return {path: value for path, value in values.items() if value != value_of(config, KEYS[path])}


def _model_line(config: Config, model_config: dict[str, Any] | None, shape: estimate.ModelShape | None) -> str:
    name = config.model.model
    if model_config is None:
        return f"{name}: sizes unknown until downloaded"
    kind = model_config.get("model_type", "unknown type")
    if shape is None:
        return f"{name}: {kind}, whose sizes are not estimated"
    return f"{name}: {kind}, {shape.parameters:,} parameters, {shape.layers} layers, vocabulary {shape.vocab:,}"


def _print(facts: dict[str, Any], parsed: Parsed) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    title = {"train": "training run", "campaign": "campaign", "squeeze": "standalone squeeze"}[facts["kind"]]
    console.print(f"{facts['file']}: {title}", style="bold")
    _print_config(console, facts, parsed)
    _print_list(console, "Not available yet (a run with these stops at once)", facts["not_available"], "red")
    _print_list(console, "No effect", facts["no_effect"], "yellow")
    if facts["runs"]:
        steps = sum(one["max_steps"] for one in facts["runs"])
        _print_list(console, f"Runs: {len(facts['runs'])}, {steps:,} steps in all", _run_lines(facts["runs"]), "")
    if facts["kind"] != "squeeze":
        _print_sizes(console, facts)


def _print_config(console: Console, facts: dict[str, Any], parsed: Parsed) -> None:
    console.print("\nConfig (* differs from the default)", style="bold")
    for section, values in facts["config"].items():
        console.print(f"[{section}]")
        for name, value in values.items():
            path = f"{section}.{name}"
            if path not in facts["changed"]:
                console.print(f"    {name} = {show(value)}", style="dim")
                continue
            origin = f"  from {main_flag(KEYS[path])}" if path in parsed.overrides else ""
            console.print(f"  * {name} = {show(value)}  (default {show(KEYS[path].default)}){origin}", style="cyan")
    absent = [f"[{name}]" for name in SECTIONS if name not in facts["config"]]
    if absent:
        console.print(f"absent: {', '.join(absent)}", style="dim")


def _print_list(console: Console, title: str, lines: list[str], style: str) -> None:
    if lines:
        console.print(f"\n{title}", style="bold")
        for line in lines:
            console.print(f"  {line}", style=style)


def _run_lines(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each condition with its seeds, and what it changes besides the seed."""
    lines = []
    for condition in dict.fromkeys(one["condition"] for one in runs):
        members = [one for one in runs if one["condition"] == condition]
        changes = {path: value for path, value in members[0]["changed"].items() if path != "training.seed"}
        lines.append(f"{condition}_s{{{','.join(str(one['seed']) for one in members)}}}")
        lines.extend(f"    {show_key(path, value)}" for path, value in changes.items())
    return lines


def _print_sizes(console: Console, facts: dict[str, Any]) -> None:
    step = facts["tokens_per_step"]
    console.print("\nPer step", style="bold")
    console.print(
        f"  {step['prompts']} prompts, {step['completions']} completions, "
        f"at most {step['completion_tokens']:,} completion tokens"
    )
    console.print("\nModel and largest tensors", style="bold")
    console.print(f"  {facts['model']}")
    for size in facts["sizes"] or ():
        note = "" if size["allocated"] else "  (never allocated)"
        console.print(f"  {size['name']:<15} {human_bytes(size['bytes']):>10}  {size['how']}{note}")


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
