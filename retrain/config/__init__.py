"""The configuration: one schema, from which flags, help, documentation and JSON Schema are made. Imports no torch."""

from __future__ import annotations

from retrain.config.build import build
from retrain.config.campaign import Run, run_kind, run_matrix
from retrain.config.effects import without_effect, without_effect_in_campaign
from retrain.config.load import DEFAULT_PATH, dump_toml, load_config, to_dict
from retrain.config.ranks import check_ranks
from retrain.config.schema import ARRAYS, KEYS, SECTIONS, Config, Key, changed, json_schema, value_of
from retrain.config.sections import (
    AlgorithmConfig,
    BackendConfig,
    BackpressureConfig,
    CampaignConfig,
    ConditionConfig,
    DataConfig,
    EnvironmentConfig,
    EvalConfig,
    GtpoConfig,
    HicraConfig,
    InferenceConfig,
    LoggingConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PlanningConfig,
    ResumeConfig,
    RewardConfig,
    SepaConfig,
    SqueezeConfig,
    TrainingConfig,
)

__all__ = [
    "ARRAYS",
    "DEFAULT_PATH",
    "KEYS",
    "SECTIONS",
    "AlgorithmConfig",
    "BackendConfig",
    "BackpressureConfig",
    "CampaignConfig",
    "ConditionConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "GtpoConfig",
    "HicraConfig",
    "InferenceConfig",
    "Key",
    "LoggingConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanningConfig",
    "ResumeConfig",
    "RewardConfig",
    "Run",
    "SepaConfig",
    "SqueezeConfig",
    "TrainingConfig",
    "build",
    "changed",
    "check_ranks",
    "dump_toml",
    "json_schema",
    "load_config",
    "run_kind",
    "run_matrix",
    "to_dict",
    "value_of",
    "without_effect",
    "without_effect_in_campaign",
]
