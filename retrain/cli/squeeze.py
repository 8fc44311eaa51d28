"""`retrain squeeze ADAPTER_DIR or CONFIG.toml`: how many ranks an adapter uses, and a smaller one."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.cli.flags import Parsed, parse
from retrain.config import Config, SqueezeConfig, build, load_config, without_effect
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.squeeze import Compression


WIDE = 140  # columns of a table that goes to no terminal


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "squeeze")
    evaluation, eval_config = parsed.options["eval"], None
    if evaluation:
        # `--eval-examples 200` and the like are meant for the evaluation.
        others = {path: value for path, value in parsed.overrides.items() if not path.startswith("squeeze.")}
        eval_config = load_config(evaluation, others)
    return squeeze(_config(parsed), eval_config=eval_config, as_json=parsed.options["json"])


def _config(parsed: Parsed) -> Config:
    """That of a file, or of `[squeeze]` alone for an adapter's folder."""
    given = parsed.config_path
    if given is None or given.endswith(".toml"):
        if given is None and "squeeze.adapter_path" in parsed.overrides:
            return build({}, parsed.overrides)
        return parsed.load()
    if "squeeze.adapter_path" in parsed.overrides:
        raise ConfigError(f"{given}: an adapter's folder is given twice, here and by --squeeze-adapter-path")
    return build({}, {**parsed.overrides, "squeeze.adapter_path": given})


def squeeze(config: Config, *, eval_config: Config | None = None, as_json: bool = False) -> int:
    """`[squeeze]` of a config: analyse, and compress when there is an output path."""
    section = config.squeeze or SqueezeConfig()
    if not section.adapter_path:
        raise ConfigError(_no_adapter(config))
    source = Path(section.adapter_path)
    keys = {
        "target_ranks": section.target_ranks,
        "min_variance_retention": section.min_variance_retention,
        "source_rank": section.source_rank or _expected_rank(config),
        "device": section.device,
    }
    new = {"rank": section.compress_to, "per_layer": section.per_layer}
    # Torch takes seconds to import: what is wrong with the config is said before that.
    from rich.console import Console

    from retrain import squeeze as capability
    from retrain.squeeze.output import rewrite_record
    from retrain.squeeze.table import show_analysis, show_compression

    width = None if sys.stdout.isatty() else WIDE
    console = Console(file=sys.stdout, highlight=False, quiet=as_json, width=width)
    done: Compression | None = None
    if section.output_path:
        done = capability.compress(source, section.output_path, **new, **keys)
        if eval_config is not None:
            done = _evaluated(eval_config, done, source, Path(done.output), _sayer(as_json))
            rewrite_record(Path(done.output), done)
    elif eval_config is not None:
        with tempfile.TemporaryDirectory() as folder:
            done = capability.compress(source, Path(folder, "squeezed"), **new, **keys)
            done = _evaluated(eval_config, done, source, Path(done.output), _sayer(as_json))
        done = dataclasses.replace(done, output="")
    analysis = done.analysis if done is not None else capability.analyze(source, **keys)
    if as_json:
        print(json.dumps(capability.as_json(analysis, done), indent=2))
        return 0
    for line in without_effect(config):
        console.print(line, markup=False, soft_wrap=True)
    show_analysis(analysis, console)
    if done is not None:
        show_compression(done, console)
    return 0


def _evaluated(
    config: Config, done: Compression, source: Path, squeezed: Path, say: Callable[[str], None]
) -> Compression:
    from retrain.training.paired import compare_adapters

    comparison = compare_adapters(config, source, squeezed, say=say)
    return dataclasses.replace(done, evaluation=dataclasses.asdict(comparison))


def _expected_rank(config: Config) -> int:
    """`[model] lora_rank` where it is written; its default says nothing about the adapter."""
    return config.model.lora_rank if "lora_rank" in config.model.model_fields_set else 0


def _no_adapter(config: Config) -> str:
    final = Path(config.logging.log_dir, "final")
    hint = f", such as the one this config's run has written: {final}" if final.is_dir() else ""
    return f"squeeze.adapter_path: is not set; give the folder of an adapter{hint}"


def _sayer(quiet: bool) -> Callable[[str], Any]:
    return (lambda line: None) if quiet else print
