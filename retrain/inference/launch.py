"""The command that starts the server of a config: `retrain serve`. Torch-free.

vLLM: https://docs.vllm.ai/en/latest/cli/serve.html; SGLang: https://docs.sglang.io (server arguments); MAX:
https://docs.modular.com/max/cli/serve; mlx: `mlx_lm.server --help`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from retrain.assets import resolve_model
from retrain.config.engines import parse_urls
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config

# vLLM's --max-lora-rank is one of these.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Launch:
    """argv: the command. environment: variables it needs beside those there are."""

    argv: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class _Place:
    """Where the server runs. cpu: no GPU is meant to be used, so that it serves in float32 as the trainer trains."""

    host: str
    port: str
    cpu: bool


def serve_command(config: Config, *, cpu: bool) -> Launch:
    """The command for `inference.engine`, at the address of `inference.url`.

    cpu: whether the machine serves without a GPU. Raises ConfigError where there is no server to start.
    """
    engine = config.inference.engine
    if engine not in _COMMANDS:
        known = ", ".join(f'"{name}"' for name in _COMMANDS)
        raise ConfigError(f'inference.engine = "{engine}": no server to start; retrain serve knows {known}')
    urls = parse_urls(config.inference.url, engine)
    if len(urls) != 1:
        raise ConfigError(f"inference.url: names {len(urls)} servers, retrain serve starts one: give --url for each")
    parts = urlsplit(urls[0])
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return _COMMANDS[engine](config, _Place(parts.hostname or "", str(port), cpu))


def _vllm(config: Config, place: _Place) -> Launch:
    inference, rank = config.inference, config.model.lora_rank
    limit = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    if limit is None:
        raise ConfigError(f"model.lora_rank = {rank}: vLLM serves adapters up to rank {VLLM_RANKS[-1]}")
    argv = ["vllm", "serve", resolve_model(config.model.model), "--host", place.host, "--port", place.port]
    argv += ["--served-model-name", config.model.model, "--enable-lora", "--max-lora-rank", str(limit)]
    argv += ["--dtype", _dtype(config, place)]
    argv += _context(config, "--max-model-len")
    argv += _trust(config)
    # Log-probs as they were sampled; vLLM's own default reports them at temperature 1.
    argv += ["--logprobs-mode", "processed_logprobs"] if config.training.temperature != 1 else []
    argv += [] if inference.prefix_caching else ["--no-enable-prefix-caching"]
    argv += _option("--kv-cache-dtype", inference.kv_cache_dtype, bf16="bfloat16", int8="int8_per_token_head")
    argv += _option("--attention-backend", inference.attention_kernel, flash="FLASH_ATTN", triton="TRITON_ATTN")
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    if place.cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    return Launch(tuple(argv), environment)


def _sglang(config: Config, place: _Place) -> Launch:
    argv = ["python3", "-m", "sglang.launch_server", "--model-path", resolve_model(config.model.model)]
    argv += ["--host", place.host, "--port", place.port, "--served-model-name", config.model.model]
    argv += ["--enable-lora", "--max-lora-rank", str(config.model.lora_rank), "--lora-target-modules", "all"]
    argv += ["--dtype", _dtype(config, place)]
    argv += _context(config, "--context-length")
    argv += _trust(config)
    argv += [] if config.inference.prefix_caching else ["--disable-radix-cache"]
    argv += _option("--kv-cache-dtype", config.inference.kv_cache_dtype, fp8="fp8_e4m3")
    argv += _option("--attention-backend", config.inference.attention_kernel, flash="fa3")
    argv += ["--device", "cpu"] if place.cpu else []
    return Launch(tuple(argv), {})


def _max(config: Config, place: _Place) -> Launch:
    argv = ["max", "serve", "--model", resolve_model(config.model.model), "--port", place.port]
    argv += ["--served-model-name", config.model.model, "--quantization-encoding", _dtype(config, place)]
    argv += _context(config, "--max-length")
    argv += _trust(config)
    argv += [] if config.inference.prefix_caching else ["--no-enable-prefix-caching"]
    argv += _option("--kv-cache-format", config.inference.kv_cache_dtype, bf16="bfloat16", fp8="float8_e4m3fn")
    argv += ["--devices", "cpu"] if place.cpu else []
    # Its overlap scheduler gives no log-probs. There is no flag for the address; its default is every network.
    return Launch((*argv, "--no-enable-overlap-scheduler"), {"MAX_SERVE_HOST": place.host})


def _mlx(config: Config, place: _Place) -> Launch:
    for key in ("dtype", "kv_cache_dtype"):
        if (value := getattr(config.inference, key)) != "auto":
            raise ConfigError(
                f'inference.{key} = "{value}": mlx_lm.server has the format of the model\'s files; set it to "auto", '
                "or start the server yourself with such a model"
            )
    model = resolve_model(config.model.model)
    argv = ("mlx_lm.server", "--model", model, "--host", place.host, "--port", place.port, *_trust(config))
    return Launch(argv, {})


_COMMANDS: dict[str, Callable[[Config, _Place], Launch]] = {"vllm": _vllm, "sglang": _sglang, "max": _max, "mlx": _mlx}


def _option(flag: str, value: str, **theirs: str) -> list[str]:
    """The flag, with the server's own word for a value; nothing where the config leaves it to the server."""
    return [] if value in ("auto", "default") else [flag, theirs.get(value, value)]


def _dtype(config: Config, place: _Place) -> str:
    """The trainer's own number format, unless `inference.dtype` says otherwise: what differs shows in logprob_gap."""
    chosen = config.inference.dtype
    if chosen in ("fp8", "fp4"):
        raise ConfigError(f'inference.dtype = "{chosen}": start the server yourself with a model in that format')
    trained = {"auto": "float32" if place.cpu else "bfloat16", "fp32": "float32", "bf16": "bfloat16"}
    return "bfloat16" if chosen == "bf16" else trained[config.training.dtype]


def _trust(config: Config) -> list[str]:
    return ["--trust-remote-code"] if config.model.trust_remote_code else []


def _context(config: Config, flag: str) -> list[str]:
    """Room for the longest prompt and completion, where the config bounds both; else the model's own context."""
    longest = config.training.max_prompt_tokens
    return [flag, str(longest + config.training.max_tokens)] if longest else []
