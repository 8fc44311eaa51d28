"""`retrain doctor`: what this machine has and lacks for a config. Imports torch, unlike the other light commands."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retrain import data, estimate
from retrain.assets import resolve_model
from retrain.cli.explain import human_bytes
from retrain.cli.flags import parse
from retrain.config import DEFAULT_PATH, Config
from retrain.config.engines import parse_urls
from retrain.config.fields import source_kind
from retrain.environment import module_of
from retrain.types import ConfigError

if TYPE_CHECKING:
    import torch

CORE = ("transformers", "peft", "safetensors", "numpy", "pydantic", "rich", "math-verify", "tomli-w")
# Extra of this package -> the distribution it brings, and when a config cannot do without it.
EXTRAS: dict[str, tuple[str, Callable[[Config], bool]]] = {
    "wandb": ("wandb", lambda config: bool(config.logging.wandb_project)),
    "tensorboard": ("tensorboard", lambda config: config.logging.tensorboard),
    "data": ("datasets", lambda config: _needs_datasets(config)),
    "reasoning-gym": ("reasoning_gym", lambda config: source_kind(config.data.source) == "reasoning_gym"),
    "verifiers": ("verifiers", lambda config: config.environment.provider == "verifiers"),
    "semantic": ("sentence-transformers", lambda config: config.planning.detector == "semantic"),
    "tinker": ("tinker", lambda config: config.backend.backend == "tinker"),
    "ray": ("ray", lambda config: config.campaign is not None and config.campaign.executor == "ray"),
    "triton": ("triton", lambda config: False),
    "gguf": ("gguf", lambda config: config.model.model.endswith(".gguf")),
}
LITTLE_DISK = 2**30
REQUEST_SECONDS = 3.0

Level = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. fix: the command or change that would help; empty where nothing is needed."""

    level: Level
    subject: str
    detail: str
    fix: str = ""


def run(argv: list[str]) -> int:
    parsed = parse(argv, "doctor")
    about_config = parsed.config_path or parsed.overrides or Path(DEFAULT_PATH).exists()
    config = parsed.load() if about_config else None
    findings = list(examine(config))
    can_run = all(finding.level != "fail" for finding in findings)
    if parsed.options["json"]:
        print(json.dumps({"can_run": can_run, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings, can_run, (parsed.config_path or DEFAULT_PATH) if about_config else "this machine")
    return 0 if can_run else 1


def examine(config: Config | None) -> Iterator[Finding]:
    """Findings about the machine, and about `config` on it."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield _torch()
    for name in CORE:
        yield _package(name, required=True, fix=f"pip install {name}")
    for extra, (name, needed) in EXTRAS.items():
        yield _package(name, required=config is not None and needed(config), fix=f'pip install "retrain[{extra}]"')
    if config is None:
        yield from _this_machine()
        return
    if config.backend.backend == "tinker":
        yield _service(config)
    else:
        yield from _devices(config)
    yield _model(config)
    yield _environment(config) if config.environment.provider else _data(config)
    yield _disk(Path(config.logging.log_dir))
    if config.inference.engine != "pytorch":
        yield from map(_server, parse_urls(config.inference.url, config.inference.engine))


def _service(config: Config) -> Finding:
    from retrain.backend.tinker.service import check_requirements

    url = config.model.base_url
    try:
        check_requirements()
        if url:
            urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/healthz", timeout=REQUEST_SECONDS).close()
    except ConfigError as exc:
        return Finding("fail", "service", str(exc))
    except (OSError, ValueError) as exc:
        return Finding("fail", "service", f"{url} does not answer: {exc}", "start it, or correct model.base_url")
    return Finding("ok", "service", f"{url} answers" if url else "the Tinker service: not asked")


def _torch() -> Finding:
    try:
        import torch
    except ImportError as exc:
        return Finding("fail", "torch", f"cannot be imported: {exc}", "pip install torch")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    metal = ["MPS"] if torch.backends.mps.is_available() else []
    found = ", ".join(gpus + metal) or "no GPU"
    return Finding("ok", "torch", f"{torch.__version__}: {found}, {torch.get_num_threads()} threads")


def _needs_datasets(config: Config) -> bool:
    source = config.data.source
    return not config.environment.provider and (data.is_on_hub(source) or source.endswith(".parquet"))


def _package(name: str, *, required: bool, fix: str) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        if required:
            return Finding("fail", name, "missing, and needed", fix)
        return Finding("note", name, "not installed (optional)", fix)


def _this_machine() -> Iterator[Finding]:
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    yield from map(_kernels, gpus or [torch.device("cpu")])


def _devices(config: Config) -> Iterator[Finding]:
    from retrain.backend.devices import resolve_device

    for name in config.backend.devices.split(","):
        remarks: list[str] = []
        try:
            device = resolve_device(name, remarks.append)
        except ConfigError as exc:
            yield Finding("fail", "device", str(exc))
        else:
            yield Finding("note" if remarks else "ok", "device", remarks[0] if remarks else f"{name} is {device}")
            yield _kernels(device)


def _kernels(device: torch.device) -> Finding:
    from retrain.backend.devices import kernels_on

    implementation, obstacle = kernels_on(device)
    if implementation == "triton":
        return Finding("ok", "kernels", f"fused Triton kernels on {device}")
    level = "note" if device.type == "cuda" else "ok"
    fix = 'pip install "retrain[triton]"' if level == "note" and "not installed" in obstacle else ""
    return Finding(level, "kernels", f"plain PyTorch on {device}" + (f": {obstacle}" if obstacle else ""), fix)


def _model(config: Config) -> Finding:
    name = config.model.model
    try:
        folder = Path(resolve_model(name)).expanduser()
    except ConfigError as exc:
        return Finding("fail", "model", str(exc))
    model_config = estimate.find_model_config(name)
    if model_config is not None:
        shape = estimate.shape_of(model_config)
        size = f", {shape.parameters:,} parameters" if shape else ""
        return Finding("ok", "model", f"{name}: {model_config.get('model_type', 'unknown type')}{size}")
    if folder.is_dir():
        return Finding("fail", "model", f"{name}: the folder has no readable config.json", "name a model's own folder")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return Finding(
            "fail", "model", f"{name}: no such folder", "set model.model to a folder, hub id or builtin:tiny"
        )
    return Finding("note", "model", f"{name}: not downloaded yet; a run downloads it", f"hf download {name}")


def _data(config: Config) -> Finding:
    source = config.data.source
    if data.is_on_hub(source):
        return Finding("note", "data", f"{source}: a run fetches it from the hub, or reads it from the cache")
    try:
        found = data.load(config.data, max_examples=config.training.max_examples)
    except ConfigError as exc:
        return Finding("fail", "data", str(exc))
    return Finding("ok", "data", f"{source}: {len(found.train):,} examples to train on, {len(found.eval):,} held out")


def _environment(config: Config) -> Finding:
    name = config.environment.id
    module = module_of(name)
    if importlib.util.find_spec(module) is not None:
        return Finding("ok", "environment", f"{name}: module {module} is installed")
    level = "note" if config.environment.auto_install else "fail"
    return Finding(level, "environment", f"{name}: no module {module} is installed", f"prime env install {name}")


def _disk(log_dir: Path) -> Finding:
    existing = next(parent for parent in (log_dir.absolute(), *log_dir.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("fail", "log_dir", f"{existing} cannot be written to", "give another --log-dir")
    free = shutil.disk_usage(existing).free
    detail = f"{log_dir}: {human_bytes(free)} free"
    return (
        Finding("note", "log_dir", detail, "free some space")
        if free < LITTLE_DISK
        else Finding("ok", "log_dir", detail)
    )


def _server(url: str) -> Finding:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=REQUEST_SECONDS) as answer:
            return Finding("ok", "engine", f"{url} answers ({answer.status})")
    except urllib.error.HTTPError as exc:
        return Finding("ok", "engine", f"{url} answers ({exc.code})")
    except (OSError, ValueError) as exc:
        return Finding(
            "fail", "engine", f"{url} does not answer: {exc}", "start it (`retrain serve CONFIG`), or correct the url"
        )


def _print(findings: list[Finding], can_run: bool, subject: str) -> None:
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        fix = f"  ->  {finding.fix}" if finding.fix else ""
        print(f"{finding.level:<4}  {finding.subject:<{width}}  {finding.detail}{fix}")
    print(f"\n{subject}: {'ready' if can_run else 'cannot run as it is; see the lines marked fail'}")
