"""The sections of experiments: adaptive batch size, rank analysis, campaigns of many runs. See `sections.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from retrain.config.fields import AdvantageMode, ConditionName, IntList, Overrides, TransformMode, from_array
from retrain.config.section import Section


class BackpressureConfig(Section):
    """Adaptive batch size by the Universal Scalability Law."""

    enabled: bool = Field(
        default=False, description="Adapt the batch size to the measured throughput, from batch_size on."
    )
    warmup_steps: int = Field(default=10, ge=1, description="Steps that try growing batch sizes before the first fit.")
    ema_decay: float = Field(default=0.9, ge=0, lt=1, description="Decay of the average throughput.")
    throttle_margin: float = Field(default=0.85, gt=0, le=1, description="Target share of the optimal concurrency.")
    increase_margin: float = Field(
        default=0.5, ge=0, le=1, description="Share of the target below which the batch grows."
    )
    min_batch_size: int = Field(default=1, ge=1, description="Smallest batch size.")
    max_batch_size: int = Field(default=64, ge=1, description="Largest batch size.")
    peak_gflops: float = Field(default=0.0, ge=0, description="Peak GFLOPS of the hardware. 0 = no roofline hints.")
    peak_bw_gb_s: float = Field(default=0.0, ge=0, description="Peak memory bandwidth in GB/s. 0 = no roofline hints.")


class SqueezeConfig(Section):
    """Rank analysis and compression of an adapter; in a campaign, of the first finished run's."""

    min_variance_retention: float = Field(
        default=0.95, gt=0, le=1, description="Share of variance that a rank must retain."
    )
    adapter_path: str = Field(default="", description="Adapter folder. Needed on its own, filled in by a campaign.")
    source_rank: int = Field(default=0, ge=0, description="Rank of the adapter. 0 = as `[model] lora_rank` says.")
    target_ranks: IntList = Field(default=(), description="Ranks that are tried. Empty = powers of two.")
    output_path: str = Field(default="", description="Folder for the compressed adapter. Empty = no compression.")
    compress_to: int = Field(default=0, ge=0, description="Rank of the compressed adapter. 0 = the recommended one.")
    per_layer: bool = Field(
        default=False, description="Compress each layer to the smallest rank that retains its share of variance."
    )
    device: str = Field(default="cpu", min_length=1, description="Torch device of the computation.")
    at_steps: IntList = Field(
        default=(), description="In training: steps after which the adapter is squeezed and training goes on."
    )
    to_ranks: IntList = Field(default=(), description="In training: the rank from each of `at_steps` on.")


class ConditionConfig(Section):
    """One condition of a campaign; what it leaves out is as in the rest of the file."""

    name: ConditionName = Field(default="", description="Name of the condition. Empty = advantage_mode+transform_mode.")
    advantage_mode: AdvantageMode | None = Field(default=None, description="As in `[algorithm]`.")
    transform_mode: TransformMode | None = Field(default=None, description="As in `[algorithm]`.")
    overrides: Overrides = Field(default_factory=dict, description='Any other keys, as in "training.lr" = 1e-5.')


class CampaignConfig(Section):
    """Many runs from one file: every condition with every seed."""

    seeds: IntList = Field(
        default=(42, 101, 202, 303, 404, 505, 606, 707), description="Seeds; every condition runs with each of them."
    )
    max_steps: int = Field(default=0, ge=0, description="Steps of each run. 0 = as `[training] max_steps`.")
    parallel: bool = Field(default=False, description="Run several at a time, each in its own process.")
    max_workers: int = Field(default=0, ge=0, description="Most runs at a time. 0 = as many as fit.")
    stagger_seconds: float = Field(default=0.0, ge=0, description="Seconds between the starts of two runs.")
    executor: Literal["local", "ray"] = Field(default="local", description="Where the runs are executed.")
    ray_address: str = Field(default="", description="Address of the Ray cluster (executor `ray`).")
    conditions: Annotated[tuple[ConditionConfig, ...], from_array] = Field(
        default=(), description="Conditions, as `[[campaign.conditions]]` tables. Empty = the five-step ablation."
    )
