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
    value_of,
    without_effect,
    without_effect_in_campaign,
)
from retrain.config.show import show, show_key
from retrain.types import ConfigError

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
    model_config = estimate.find_model_config(config.model.model)
    shape = estimate.shape_of(model_config) if model_config is not None else None
    nproc = nproc_of(config, parsed)
    one_device = config.campaign is not None  # which gives each of its runs one of those it names
    found = None if shape is None else estimate.processes(config, shape, nproc, one_device=one_device)
    return {
        "file": parsed.config_path or DEFAULT_PATH,
        "kind": run_kind(config),
        "config": plain,
        "changed": {path: plain[KEYS[path].section][KEYS[path].name] for path in changed(config)},
        "no_effect": _without_effect(config, matrix),
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
        "peak_bytes": max((process.peak_bytes for process in found), default=0) if found is not None else None,
        "processes": None if found is None else [_memory(process) for process in found],
        "sizes": None if shape is None or found is None else _sizes(config, shape, found),
    }


def nproc_of(config: Config, parsed: Parsed) -> int:
    """The number of `--nproc`, 1 without it. Raises ConfigError where it is none, or devices name several."""
    text = parsed.options["nproc"]
    if text is None:
        return 1
    if not (text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"--nproc {text}: must be a number of processes, 1 or more")
    if "," in config.backend.devices and int(text) > 1:
        raise ConfigError(f'--nproc {text}: name one device (now backend.devices = "{config.backend.devices}")')
    return int(text)


def _memory(process: estimate.Process) -> dict[str, Any]:
    phases = [{"name": p.name, "bytes": p.bytes, "parts": [asdict(part) for part in p.parts]} for p in process.phases]
    return {
        "name": process.name,
        "device": process.device,
        "count": process.count,
        "peak_bytes": process.peak_bytes,
        "peak_phase": process.peak_phase.name,
        "kept_bytes": process.kept_bytes,
        "kept": [asdict(part) for part in process.kept],
        "phases": phases,
    }


def _sizes(config: Config, shape: estimate.ModelShape, found: list[estimate.Process]) -> list[dict[str, Any]]:
    """The parts of all processes by name, the first of each; and what is never allocated."""
    parts: dict[str, estimate.Part] = {}
    for process in found:
        for part in (*process.kept, *(part for phase in process.phases for part in phase.parts)):
            parts.setdefault(part.name, part)
    listed = [asdict(part) | {"allocated": True} for part in parts.values()]
    return [*listed, asdict(estimate.largest_logits(config, shape)) | {"allocated": False}]


def _without_effect(config: Config, matrix: tuple[Run, ...]) -> list[str]:
    """In a campaign, what changes nothing in any run."""
    return without_effect_in_campaign(config, [one.config for one in matrix]) if matrix else without_effect(config)


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
    console.print("\nModel and peak memory (an estimate, where lengths are what the config allows)", style="bold")
    console.print(f"  {facts['model']}")
    for process in facts["processes"] or ():
        _print_process(console, process)
    if facts["processes"] == []:
        console.print("  trained by a service: no memory of a model here")
    for size in facts["sizes"] or ():
        if not size["allocated"]:
            console.print(_part_line(size) + "  (never allocated)")


def _print_process(console: Console, process: dict[str, Any]) -> None:
    each = f"each of {process['count']} processes" if process["count"] > 1 else process["name"]
    peak = f"{human_bytes(process['peak_bytes'])} at most, in {process['peak_phase']}"
    console.print(f"  {each} on {process['device']}: {peak}", style="cyan")
    for part in process["kept"]:
        console.print(_part_line(part))
    for phase in process["phases"]:
        console.print(f"  {phase['name']}, beside these: {human_bytes(phase['bytes'])}")
        for part in phase["parts"]:
            console.print(_part_line(part))


def _part_line(part: dict[str, Any]) -> str:
    return f"    {part['name']:<18} {human_bytes(part['bytes']):>10}  {part['how']}"


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
