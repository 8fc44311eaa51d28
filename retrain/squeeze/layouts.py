"""What an adapter_config.json says, as far as a squeeze is concerned: every field of PEFT's LoRA config is decided.

A squeeze is exact where the layer computes s B A x and nothing else that depends on the rank. A field that is not known
here must be unset: what it would mean for the squeezed adapter is not known either.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from retrain.types import ConfigError

# Written anew with the squeezed adapter.
RECOMPUTED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config"}

# Taken over as they are: what they do does not depend on the rank.
CARRIED = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "target_parameters",
    "fan_in_fan_out",
    "lora_dropout",
    "use_rslora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "velora_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
}

# Refused when set: the layer computes something else than s B A x.
REFUSED = {
    "use_dora": "DoRA: it scales the columns of the merged weight, which a truncation changes",
    "use_qalora": "QA-LoRA: A sees pooled inputs",
    "use_bdlora": "BD-LoRA: its factors are block-diagonal, which a truncation is not",
    "kasa_config": "KaSA: it changes the base weights by its rank",
    "monteclora_config": "MonteCLoRA: its factors are random",
    "arrow_config": "Arrow: it routes between several adapters",
    "megatron_config": "Megatron: its layers are split over processes",
}

# Of `init_lora_weights`: those that leave the base as it is. The loaded factors replace whatever they draw.
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError naming what keeps an adapter of this config from being squeezed exactly. place: its folder."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{place}: is an adapter of type {kind}, not LoRA; only LoRA has a rank to squeeze")
    numbers = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in numbers) or not config.get("lora_alpha"):
        raise ConfigError(f"{place}: its config has no usable r, rank_pattern or lora_alpha")
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ConfigError(f"{place}: cannot be squeezed exactly ({name}). {reason}")
    init = config.get("init_lora_weights")
    if init not in HARMLESS_INITS:
        raise ConfigError(
            f'{place}: init_lora_weights = "{init}" changes the base weights, by its rank, whenever it is loaded. '
            "Convert it first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    unknown = sorted(name for name in set(config) - RECOMPUTED - CARRIED - set(REFUSED) if config[name])
    if unknown:
        raise ConfigError(
            f"{place}: sets {', '.join(unknown)}, which this version of retrain does not know: whether a squeeze would "
            "keep its function is open. Use a newer version"
        )
    if config.get("target_parameters") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        raise ConfigError(
            f"{place}: has target_parameters together with rank_pattern or alpha_pattern. Its files do not tell which "
            "pattern is meant for which parameter"
        )


def rank_of(config: Mapping[str, Any], site: str) -> int:
    """The rank of a module by its name."""
    return _by_pattern(config.get("rank_pattern"), site, config["r"])


def alpha_of(config: Mapping[str, Any], site: str) -> float:
    return _by_pattern(config.get("alpha_pattern"), site, config["lora_alpha"])


def scale_of(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    """s of dW = s B A."""
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def alpha_for(config: Mapping[str, Any], rank: int, scale: float) -> float:
    """The alpha that gives `scale` at a rank; an int where it is one, as it is nearly always."""
    alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def with_ranks(config: Mapping[str, Any], sites: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The config of the same adapter with other ranks and alphas. sites: {module: (rank, scale)}.

    r is the largest rank, which servers make room for; modules that have another one are named in the patterns.
    """
    rank = max(rank for rank, _ in sites.values())
    alphas = {site: alpha_for(config, own, scale) for site, (own, scale) in sites.items()}
    alpha = Counter(alphas[site] for site, (own, _) in sites.items() if own == rank).most_common(1)[0][0]
    return {
        **config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(site): own for site, (own, _) in sites.items() if own != rank},
        "alpha_pattern": {_exactly(site): own for site, own in alphas.items() if own != alpha},
        # Only the start of a training depends on it, and some ways to start do not take every rank.
        "init_lora_weights": True,
        "eva_config": None,
    }


def _exactly(site: str) -> str:
    """A pattern that no other module's name matches: PEFT looks for it at the end of the name."""
    return "^" + re.escape(site)


def _by_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """As PEFT looks it up: the first pattern that matches the end of the name, from a dot on."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", site))
    return next(found, default)
