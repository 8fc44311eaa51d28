"""A whole optimizer step of the engine: what token-level credit costs, and where the log-probs come from.

    python kernels/benchmarks/training_step.py --json training_step.json

LocalBackend on a random Qwen3 of the given size, LoRA on all linear layers, a random batch. Every contender is the same
step, with gtpo_sepa unless it says none, and with its log-probs and entropies computed by ours, by PyTorch or by TRL.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import (
    Case,
    Check,
    Contender,
    Entry,
    Results,
    Run,
    Target,
    compare,
    memory_ratio,
    not_installed,
    parse,
    time_ratio,
)
from linear_logprob import LARGE_VOCABULARY, LogProb, chunked, plain, trl_fused
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from retrain.backend import learner as learner_module
from retrain.backend.learner import Learner
from retrain.backend.local import LocalBackend
from retrain.config import Config
from retrain.config.build import build as build_config
from retrain.types import Batch, Rollout
from retrain_kernels import dispatch, linear_logprob

FLAGS = {
    "hidden": (64, 1024, "hidden size"),
    "layers": (2, 28, "layers"),
    "vocab": (151936, 151936, "vocabulary"),
    "prompts": (2, 8, "prompts of a batch"),
    "group": (4, 8, "completions of a prompt"),
    "prompt-tokens": (16, 128, "tokens of a prompt"),
    "tokens": (32, 512, "most tokens of a completion; the fewest are half as many"),
    "micro-batch": (16384, 16384, "training.micro_batch_tokens"),
    "chunk-rows": (64, 1024, "rows that torch chunked takes at a time"),
}
HEAD_DIM = 64
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TEMPERATURE = 1.0
# What token-level credit may cost, in time and in memory, over the same step without it.
FREE = 1.02


def save_model(args: Namespace, folder: Path) -> None:
    """A Qwen3 with random weights, and a tokenizer that knows bytes."""
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // HEAD_DIM),
        num_key_value_heads=max(1, args.hidden // HEAD_DIM // 2),
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        # Logits of standard deviation 3, about as wide as a trained model's.
        initializer_range=3 / args.hidden**0.5,
    )
    disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(args.device):
        AutoModelForCausalLM.from_config(config, dtype=args.dtype).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)


def random_batch(args: Namespace) -> Batch:
    rng = np.random.default_rng(0)
    lengths = rng.integers((args.tokens + 1) // 2, args.tokens + 1, args.prompts * args.group)
    rollouts = tuple(
        Rollout(
            group=i // args.group,
            tokens_T=rng.integers(2, args.vocab, length),
            logprobs_T=rng.normal(-np.log(args.vocab), 0.1, length).astype(np.float32),
            advantage=float(np.float32(rng.normal())),
            planning_T=rng.random(length) < 0.1,
        )
        for i, length in enumerate(lengths)
    )
    prompts = tuple(rng.integers(2, args.vocab, args.prompt_tokens) for _ in range(args.prompts))
    return Batch(prompts, rollouts, sepa_lambda=0.5)


def config_for(args: Namespace, folder: Path, transform: str) -> Config:
    return build_config(
        {},
        overrides={
            "model.model": str(folder),
            "backend.devices": "cpu" if args.device.type == "cpu" else f"gpu:{args.device.index or 0}",
            "training.dtype": DTYPE_NAMES[args.dtype],
            "training.temperature": TEMPERATURE,
            "training.max_tokens": args.tokens,
            "training.micro_batch_tokens": args.micro_batch,
            # The adapter stays where it is: every contender takes the same step, as often as it is timed.
            "training.lr": 0.0,
            # The gradient is compared as it is, not cut.
            "training.max_grad_norm": 0.0,
            "algorithm.transform_mode": transform,
            # Log-probs of a sampler that is not there would say nothing.
            "loss.old_logprobs": "recompute",
        },
    )


def in_float64(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """float64 from the same hidden states: what is judged is the log-prob, not the model's number format."""
    logprob, entropy = chunked(64)(hidden.double(), weight.double(), targets)
    return logprob, entropy


def one_step(backend: LocalBackend, learner: Learner, batch: Batch, logprob_of: LogProb | None) -> Results:
    """A step of the engine with its log-probs from `logprob_of` (None: its own); its gradient, of all the adapter."""

    def stand_in(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Any, temperature: float, **_: Any) -> Any:
        assert bias is None and temperature == TEMPERATURE and logprob_of is not None
        return logprob_of(hidden, weight, targets)

    backend.learner = learner
    with patch.object(learner_module, "linear_logprob", linear_logprob if logprob_of is None else stand_in):
        backend.step(batch, 0)
    return {"gradient": torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])}


def build(args: Namespace, folder: Path) -> Case:
    save_model(args, folder)
    configs = {name: config_for(args, folder, name) for name in ("gtpo_sepa", "none")}
    backend = LocalBackend(configs["none"], seed=0, say=lambda line: None)
    stir(backend)
    learners = {name: Learner(backend.policy, config) for name, config in configs.items()}
    batch = random_batch(args)
    checks = {
        name: Check(one_step(backend, learner, batch, in_float64), one_step(backend, learner, batch, plain))
        for name, learner in learners.items()
    }

    def contender(key: str, name: str, logprob_of: LogProb | None, transform: str, missing: str = "") -> Contender:
        def prepare() -> Run:
            return lambda _: one_step(backend, learners[transform], batch, logprob_of)

        return Contender(key, name, f"the step, {transform}", prepare, missing, checks[transform])

    kind = dispatch.resolve("auto", args.device)
    contenders = [
        contender("ours", f"retrain ({kind})", None, "gtpo_sepa"),
        contender("none", f"retrain ({kind}), no credit", None, "none"),
        contender("plain", "PyTorch, all logits", plain, "gtpo_sepa"),
        contender("chunked", "PyTorch, chunked", chunked(args.chunk_rows), "gtpo_sepa"),
        contender("trl", "TRL fused head", trl_fused, "gtpo_sepa", not_installed("trl", "trl")),
        contender("liger", "Liger", None, "gtpo_sepa", "computes a loss: this step wants log-probs and entropies"),
    ]
    shape = {
        "hidden": args.hidden,
        "layers": args.layers,
        "V": args.vocab,
        "prompts": args.prompts,
        "completions": len(batch.rollouts),
        "tokens": batch.num_tokens,
    }
    settings = {"impl": kind, "micro_batch_tokens": args.micro_batch, "chunk_rows": args.chunk_rows}
    model_bytes = sum(p.nbytes for p in backend.policy.peft.parameters())
    return Case(shape, args.dtype, contenders, targets_of(args, model_bytes), settings)


@torch.no_grad()
def stir(backend: LocalBackend) -> None:
    """An adapter as training leaves it; as it begins, with B = 0, half of the gradient is zero."""
    for parameter in backend.policy.adapter_parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def targets_of(args: Namespace, model_bytes: int) -> Callable[[Mapping[str, Entry]], list[Target]]:
    """On a CPU a step's time and malloc's memory vary by more than two percent: there, credit is only measured."""

    def of_credit(entries: Mapping[str, Entry]) -> list[Target]:
        peaks = [entries[key].peak_bytes if key in entries else None for key in ("ours", "none")]
        whole = [model_bytes + peak for peak in peaks if peak is not None]
        return [
            Target("time of gtpo_sepa over none", time_ratio(entries, "ours", "none"), FREE),
            Target("memory of gtpo_sepa over none", whole[0] / whole[1] if len(whole) == 2 else None, FREE),
        ]

    def of_logits(entries: Mapping[str, Entry]) -> list[Target]:
        return [
            Target("peak memory over that of all logits", memory_ratio(entries, "ours", "plain"), 0.25),
            Target("time over that of all logits", time_ratio(entries, "ours", "plain"), 1.0),
        ]

    if args.device.type == "cuda":
        return of_credit
    return of_logits if args.vocab >= LARGE_VOCABULARY else lambda _: []


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__ or "", FLAGS, argv)
    if args.dtype not in DTYPE_NAMES or args.impl != "auto":
        raise SystemExit("the engine trains in fp32 or bf16, and chooses the implementation itself (--impl auto)")
    with tempfile.TemporaryDirectory() as folder:
        return compare("training_step", build(args, Path(folder)), args)


if __name__ == "__main__":
    sys.exit(main())
