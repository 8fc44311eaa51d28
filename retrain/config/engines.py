"""What `[inference]` can ask of each engine: attention kernels, number formats, addresses."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.config.addresses import address_problem
from retrain.config.sections import InferenceConfig
from retrain.types import ConfigError

# A server's formats are the config's word about it: what a run cannot set, `retrain serve` or its owner does.
_SERVER = {"dtype": ("bf16", "fp8", "fp4"), "kv_cache_dtype": ("bf16", "fp8", "int8")}
_GPU_SERVER = _SERVER | {"attention_kernel": ("flash", "triton")}
OFFERS: dict[str, dict[str, tuple[str, ...]]] = {
    "pytorch": {"dtype": ("bf16",), "kv_cache_dtype": ("bf16", "fp8")},
    "vllm": _GPU_SERVER,
    "sglang": _GPU_SERVER | {"kv_cache_dtype": ("bf16", "fp8")},
    "max": _SERVER | {"kv_cache_dtype": ("bf16", "fp8")},
    "mlx": _SERVER,
    "openai": _SERVER,
}
_HARDWARE = {
    "flash": "NVIDIA Ampere or later, AMD MI200 or later",
    "triton": "any GPU",
    "fp8": "NVIDIA Ada, Hopper or later, AMD MI300",
    "fp4": "NVIDIA Blackwell",
    "int8": "NVIDIA Ampere or later",
}
_USUAL = {"attention_kernel": "default", "dtype": "auto", "kv_cache_dtype": "auto"}


def inference_problems(inference: InferenceConfig) -> Iterator[str]:
    """A message for everything that is wrong with the section."""
    if inference.top_p != 1 or inference.top_k != 0:
        yield (
            "inference.top_p / top_k: cutting the sampled distribution biases the log-probabilities that training "
            "needs; remove them (top_p = 1.0, top_k = 0)"
        )
    yield from _not_offered(inference)
    if inference.engine == "pytorch":
        for key in ("dtype", "kv_cache_dtype"):
            value = getattr(inference, key)
            if value != "auto" and not inference.merged_copy:
                yield (
                    f'inference.{key} = "{value}": only a merged copy has a format of its own; set it to "auto", or '
                    "inference.merged_copy = true"
                )
        return
    try:
        urls = parse_urls(inference.url, inference.engine)
    except ConfigError as error:
        yield str(error)
        return
    problems = (address_problem("inference.url", u, inference.engine, allow_http=inference.allow_http) for u in urls)
    yield from (problem for problem in problems if problem)


def _not_offered(inference: InferenceConfig) -> Iterator[str]:
    """A message for each kernel or format that the engine does not have, with who does."""
    for key, usual in _USUAL.items():
        value = getattr(inference, key)
        if value == usual or value in OFFERS[inference.engine].get(key, ()):
            continue
        asked = f'inference.{key} = "{value}": '
        engines = [f'"{name}"' for name in ("vllm", "sglang") if value in OFFERS[name].get(key, ())]
        if engines:
            yield (
                f'{asked}the engine "{inference.engine}" does not offer it; use "{usual}", or inference.engine = '
                f"{' or '.join(engines)} on a GPU that has it ({_HARDWARE[value]})"
            )
        else:
            yield f'{asked}no engine offers it for the models that are trained here; use "{usual}"'


def parse_urls(value: str, engine: str) -> list[str]:
    """The servers of `inference.url`, without a trailing slash or /v1. Raises ConfigError."""
    urls = [part.strip().rstrip("/").removesuffix("/v1") for part in value.split(",") if part.strip()]
    if not urls:
        raise ConfigError(f'inference.engine = "{engine}": needs inference.url, such as "http://127.0.0.1:8000"')
    for url in urls:
        problem = address_problem("inference.url", url, engine, allow_http=True)
        if problem:
            raise ConfigError(problem)
    if len(set(urls)) < len(urls):
        raise ConfigError("inference.url: names a server twice")
    return urls
