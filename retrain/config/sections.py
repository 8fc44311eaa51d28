"""The sections of the configuration: names, types, ranges, defaults and descriptions of every key live here only
(those of rewards in `rewards.py`, of experiments in `experiments.py`, of the backend in `backends.py`).

A class's docstring describes its section; a Field's description its key. Help texts, flags, the reference page and the
JSON Schema are made from them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from retrain.config.backends import BackendConfig as BackendConfig
from retrain.config.experiments import BackpressureConfig as BackpressureConfig
from retrain.config.experiments import CampaignConfig as CampaignConfig
from retrain.config.experiments import ConditionConfig as ConditionConfig
from retrain.config.experiments import SqueezeConfig as SqueezeConfig
from retrain.config.fields import (
    AdvantageMode,
    EnvironmentId,
    Source,
    Table,
    TargetModules,
    TransformMode,
)
from retrain.config.rewards import RewardConfig as RewardConfig
from retrain.config.section import Section

MAX_SEED = 2**32 - 1

# GSPO clips a sequence ratio, which moves far less than a token ratio (GSPO, arXiv 2507.18071).
CLIP = {"ppo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


def _clip_default(side: int) -> Any:
    return lambda data: CLIP["gspo" if data.get("kind") == "gspo" else "ppo"][side]


class ModelConfig(Section):
    """The model that is trained, and the size of its adapter."""

    model: str = Field(
        default="Qwen/Qwen3-4B-Instruct-2507",
        min_length=1,
        description="Hugging Face model id, local folder, or `builtin:tiny` (the embedded model).",
    )
    base_url: str = Field(default="", description="URL of the Tinker service (backend `tinker` only).")
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. It has all of your rights: read it first.",
    )
    lora_rank: int = Field(default=32, ge=1, description="Rank of the LoRA adapter.")


class AlgorithmConfig(Section):
    """How rewards become advantages of tokens, and which groups are trained on."""

    advantage_mode: AdvantageMode = Field(
        default="maxrl", description="Advantage of a completion in its group; or a plug-in."
    )
    transform_mode: TransformMode = Field(
        default="gtpo_sepa", description="How an advantage is spread over tokens; or a plug-in."
    )
    uncertainty: Literal["auto", "entropy", "surprisal", "variance"] = Field(
        default="auto",
        description="Uncertainty of a token: entropy of the full distribution, -log p, or p(1-p). `auto` is entropy "
        "where backend and engine give it, else surprisal; the run says which.",
    )
    skip_uniform_groups: bool = Field(
        default=True, description="Drop groups whose rewards are all equal; they carry no gradient."
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="Sample further prompts until `batch_size` groups with unequal rewards are there (DAPO).",
    )
    max_resample_rounds: int = Field(default=3, ge=1, description="Most extra rounds of `dynamic_sampling`.")
    overlong_buffer: int = Field(
        default=0,
        ge=0,
        description="Tokens before `max_tokens` in which a growing penalty (down to -1) is added to the reward (DAPO). "
        "0 = no penalty.",
    )

    @property
    def condition(self) -> str:
        """What this section is called in metrics, tables and run names."""
        return f"{self.advantage_mode}+{self.transform_mode}"


class LossConfig(Section):
    """The policy loss of one optimizer step."""

    kind: Literal["importance_sampling", "ppo", "cispo", "gspo"] = Field(
        default="importance_sampling", description="Policy loss."
    )
    clip_low: float = Field(
        default_factory=_clip_default(0),
        ge=0,
        lt=1,
        description="The ratio is clipped below at 1 - clip_low. Default 3e-4 with kind `gspo`.",
        json_schema_extra={"default": CLIP["ppo"][0]},
    )
    clip_high: float = Field(
        default_factory=_clip_default(1),
        ge=0,
        description="The ratio is clipped above at 1 + clip_high. Default 4e-4 with kind `gspo`.",
        json_schema_extra={"default": CLIP["ppo"][1]},
    )
    dual_clip: float = Field(default=0.0, ge=0, description="Bound c > 1 of the `ppo` loss where A < 0. 0 = off.")
    aggregation: Literal["token_mean", "seq_mean", "constant"] = Field(
        default="token_mean",
        description="Mean over all tokens of the optimizer step, mean over completions of token means, or sum / "
        "(completions * max_tokens).",
    )
    kl_coef: float = Field(default=0.0, ge=0, description="Weight of the KL to the base model. 0 = no reference pass.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="Estimator of the KL to the base model.")
    entropy_coef: float = Field(default=0.0, ge=0, description="Weight of the entropy bonus.")
    old_logprobs: Literal["sampler", "recompute"] = Field(
        default="sampler", description="Denominator of the ratio: what the sampler reported, or a pass of the trainer."
    )
    mismatch_correction: Literal["none", "token", "sequence", "mask"] = Field(
        default="none",
        description="Correction for sampler and trainer disagreeing, with old_logprobs `recompute`: truncated weight "
        "per token or per sequence, or dropping tokens above the cap.",
    )
    mismatch_cap: float = Field(default=2.0, gt=0, description="Cap of `mismatch_correction`.")
    epochs: int = Field(default=1, ge=1, description="Passes over each sampled batch.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps per pass over a sampled batch.")


class TrainingConfig(Section):
    """The loop: how long, how much per step, how fast."""

    seed: int = Field(default=-1, ge=-1, le=MAX_SEED, description="Seed of every random stream. -1 = no seed.")
    max_steps: int = Field(default=500, ge=1, description="Training steps.")
    batch_size: int = Field(default=8, ge=1, description="Prompts per step.")
    group_size: int = Field(default=16, ge=1, description="Completions sampled per prompt.")
    max_tokens: int = Field(default=2048, ge=1, description="Most new tokens of a completion.")
    temperature: float = Field(default=0.7, gt=0, description="Sampling temperature.")
    lr: float = Field(default=4e-5, ge=0, description="Learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    max_examples: int = Field(default=0, ge=0, description="Limit of the dataset. 0 = use all.")
    save_every: int = Field(default=20, ge=1, description="Steps between checkpoints.")
    max_staleness: int = Field(
        default=0,
        ge=0,
        le=2,
        description="Updates that the policy is ahead of the one that sampled a batch, exactly. From 1 on, the next "
        "batches are sampled while this one trains, where sampling has a device or server of its own.",
    )
    micro_batch_tokens: int = Field(default=16384, ge=1, description="Most tokens of one forward and backward pass.")
    gradient_checkpointing: bool = Field(default=True, description="Recompute activations instead of storing them.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are cut to this norm. 0 = no clipping.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Course of the learning rate after warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Number format of the base model. `auto` is bf16 on a GPU, else fp32."
    )
    max_prompt_tokens: int = Field(default=0, ge=0, description="Longer prompts are left out of the data. 0 = no cap.")
    keep_checkpoints: int = Field(default=3, ge=0, description="Newest checkpoints that are kept. 0 = all.")
    strict: bool = Field(
        default=False,
        description="End the run where it would warn that it is not learning, and refuse a config with a key without "
        "effect.",
    )


class OptimizerConfig(Section):
    """AdamW."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")


class LoraConfig(Section):
    """The LoRA adapter; its rank is `[model] lora_rank`."""

    alpha: int = Field(default=0, ge=0, description="LoRA alpha. 0 = twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: TargetModules = Field(
        default="all-linear", description="Modules that get an adapter: `all-linear` or a list of names."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    def alpha_for(self, rank: int) -> int:
        """The alpha in effect for an adapter of this rank."""
        return self.alpha or 2 * rank


class DataConfig(Section):
    """Where prompts come from; ignored when `[environment]` is set."""

    source: Source = Field(
        default="math",
        description="Built-in source (`math`, `gsm8k`, `math:FOLDER`, `gsm8k:FOLDER`, `arithmetic`, "
        "`arithmetic:words`, `reasoning_gym:TASK,TASK`), a file (.jsonl, .json, .csv, .parquet), a hub dataset id "
        "(`org/name` or `org/name:config`), or the dotted path of a function that returns examples.",
    )
    prompt_field: str = Field(default="prompt", min_length=1, description="Field of a record that holds the prompt.")
    prompt_template: str = Field(
        default="",
        description="Text of the prompt with {field} for a record's fields, as in `{Body} {Question}`. Empty = the "
        "prompt field alone, or as the built-in source asks.",
    )
    reference_field: str = Field(default="reference", min_length=1, description="Field that holds the reference.")
    split: str = Field(
        default="train",
        min_length=1,
        description="Split of a hub dataset, of `math` or of `gsm8k`, as in `train+test`.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the examples anew in each epoch, by the seed.")
    eval_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of the examples held out for evaluation.")


class EvalConfig(Section):
    """Evaluation on held-out examples, during training and by `retrain eval`."""

    every: int = Field(default=0, ge=0, description="Steps between evaluations. 0 = none during training.")
    examples: int = Field(default=64, ge=1, description="Most examples evaluated.")
    samples: int = Field(default=1, ge=1, description="Completions per example.")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature. 0 = greedy.")


class EnvironmentConfig(Section):
    """An environment that provides prompts, turns and rewards."""

    provider: Literal["", "verifiers"] = Field(default="", description="Environment provider. Empty = none.")
    id: EnvironmentId = Field(default="", description="Environment id, as in `primeintellect/gsm8k`.")
    args: Table = Field(default_factory=dict, description="Keyword arguments: a table, or a JSON string.")
    max_turns: int = Field(default=-1, ge=-1, description="Most turns of an episode. -1 = as the environment has it.")
    auto_install: bool = Field(default=False, description="Install a missing Prime Hub environment before loading it.")
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that an episode may spend between two turns of the model, and on its reward.",
    )


class PlanningConfig(Section):
    """Which tokens plan."""

    detector: Literal["regex", "semantic"] = Field(default="regex", description="Detector of planning tokens.")
    model: str = Field(
        default="all-MiniLM-L6-v2",
        min_length=1,
        description="Sentence-transformer of the semantic detector: hub id or folder.",
    )
    threshold: float = Field(
        default=0.02,
        ge=-2,
        le=2,
        description="How much more a window of the text must resemble planning than execution (semantic detector).",
    )


class GtpoConfig(Section):
    """Uncertainty weights of tokens."""

    beta: float = Field(default=0.1, ge=0, description="Strength of the uncertainty weights. 0 = off.")


class HicraConfig(Section):
    """Amplification of planning tokens."""

    alpha: float = Field(default=0.2, ge=0, description="Amplification of planning tokens. 0 = off.")


class SepaConfig(Section):
    """Pooling of the uncertainty of execution tokens, and its schedule."""

    steps: int = Field(default=500, ge=0, description="Steps of the linear ramp. 0 = the linear schedule stays at 0.")
    schedule: Literal["linear", "auto"] = Field(
        default="linear",
        description="`linear` ramps from 0 to 1; `auto` also follows the decay of uncertainty variance.",
    )
    delay_steps: int = Field(default=50, ge=0, description="Steps before the ramp begins.")
    correct_rate_gate: float = Field(
        default=0.1, ge=0, le=1, description="Correct rate of a batch that opens the gate, for good. 0 = always open."
    )
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="Decay of the average variance (schedule `auto`).")
    variance_threshold: float = Field(
        default=0.2, gt=0, description="Ratio to the first variance below which `auto` starts to pool."
    )
    warmup: int = Field(default=50, ge=1, description="Updates before the first variance is taken.")


class InferenceConfig(Section):
    """How completions are sampled."""

    engine: Literal["pytorch", "max", "vllm", "sglang", "mlx", "openai"] = Field(
        default="pytorch", description="Inference engine: in this process, or a server."
    )
    url: str = Field(
        default="", description="URL of the server, or of several with commas (engines other than `pytorch`)."
    )
    allow_http: bool = Field(
        default=False,
        description="Speak http:// with servers on other machines, judges included: prompts, completions and keys go "
        "over the network in the clear. This machine's own (127.0.0.0/8, ::1, localhost) need no such permission.",
    )
    attention_kernel: Literal["default", "flash", "triton", "tk", "cutlass"] = Field(
        default="default",
        description="Attention implementation: `flash` and `triton` with vLLM and SGLang, as `retrain serve` starts "
        "them.",
    )
    dtype: Literal["auto", "bf16", "fp8", "fp4"] = Field(
        default="auto",
        description="Number format of the weights that sample: in this process `auto` (as they train) or `bf16`; of a "
        "server, the one it has.",
    )
    kv_cache_dtype: Literal["auto", "bf16", "fp8", "int8"] = Field(
        default="auto",
        description="Number format of the KV cache: in this process `auto` (as the weights), `bf16` or `fp8`; of a "
        "server, the one it has.",
    )
    prefix_caching: bool = Field(default=True, description="Compute a prompt's KV cache once per group.")
    merged_copy: bool = Field(
        default=True,
        description="Sample from a copy of the weights with the adapter merged in: faster, at the memory of the "
        "adapted layers (on a CPU: of all). Engine `pytorch` only.",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling. 1 = off, as training needs it.")
    top_k: int = Field(
        default=0, ge=0, description="Sample among the k most probable tokens. 0 = off, as training needs it."
    )
    max_logprob_gap: float = Field(
        default=0.0,
        ge=0,
        description="The run stops where sampler and trainer disagree about a token's log-probability by more. "
        "0 = only report.",
    )
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds until a request to a server is given up."
    )
    retries: int = Field(default=5, ge=0, description="Further attempts after a failed request to a server.")


class ResumeConfig(Section):
    """Going on with an earlier run."""

    from_: str = Field(default="", alias="from", description="Run folder that holds trainer_state.json.")


class LoggingConfig(Section):
    """What a run leaves behind."""

    log_dir: str = Field(
        default="logs/train", min_length=1, description="Run folder: metrics, generations, checkpoints."
    )
    wandb_project: str = Field(default="", description="wandb project. Empty = no wandb.")
    wandb_run_name: str = Field(default="", description="wandb run name. Empty = advantage_mode+transform_mode.")
    wandb_entity: str = Field(default="", description="wandb entity or team.")
    wandb_group: str = Field(default="", description="wandb group.")
    wandb_tags: str = Field(default="", description="Comma-separated wandb tags.")
    strategic_grams: str = Field(
        default="",
        description="Phrases that mark planning, as a JSON array or comma-separated. Empty = the built-in ones.",
    )
    tensorboard: bool = Field(default=False, description="Write the metrics for TensorBoard, into log_dir/tensorboard.")
    credit_samples: int = Field(
        default=2,
        ge=0,
        description="Completions of a step whose tokens are recorded with their credit, for `retrain report`. "
        "0 = none.",
    )
