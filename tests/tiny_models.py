"""Tiny random models of several architectures, and batches for them: what the learner and the sampler are tested on."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from retrain.config import Config
from retrain.config.build import build
from retrain.types import Batch, Rollout

VOCAB = 272
PAD, EOS = 0, 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    # Larger than usual, so that the distributions of a random model are far from uniform.
    "initializer_range": 0.2,
}
GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.2,
}

CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True, attention_dropout=0.5),
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True),
    # Its default end of sequence, 50256, lies outside this vocabulary; its dropout is 0.1 by default.
    "gpt2": lambda: GPT2Config(**GPT2_SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma3-window": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "gemma3-cap": lambda: Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=30.0),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.0625),
}
PLAIN = ("qwen3", "llama", "gpt2")


def save_model(kind: str, folder: Path, *, eos: bool = True) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIGS[kind]()
        if not eos:
            config.eos_token_id = None
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, eos=eos)
    return folder


def save_tokenizer(folder: Path, *, eos: bool = True) -> None:
    """Every byte is a token: ids 2 to 257."""
    vocab = {"<pad>": PAD, "<eos>": EOS}
    vocab |= {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=len(vocab))}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>"} | ({"eos_token": "<eos>"} if eos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def config_for(folder: Path | str, **overrides: object) -> Config:
    """A config of few assumptions: `section__key` overrides `section.key`."""
    defaults = {
        "model.model": str(folder),
        "model.lora_rank": 4,
        "backend.devices": "cpu",
        "training.temperature": 0.8,
        "training.max_tokens": 16,
        "training.gradient_checkpointing": False,
        "algorithm.transform_mode": "none",
    }
    return build({}, overrides=defaults | {key.replace("__", "."): value for key, value in overrides.items()})


def stir(model: nn.Module, scale: float = 0.2) -> None:
    """An adapter as training leaves it: with the B matrices at zero, as they begin, much would go unnoticed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def in_float64(model: nn.Module) -> None:
    """Computes in float64 throughout; RMSNorm of transformers would go down to float32 on the way."""
    model.double()
    for module in model.modules():
        if type(module).__name__ in ("Qwen3RMSNorm", "LlamaRMSNorm"):
            module.forward = _rms_norm(module)


def _rms_norm(module: nn.Module):
    return lambda x: nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def load_with_peft(base: Path, adapter: Path, *, attention: str = "eager", trainable: bool = False) -> PeftModel:
    """What a user of the adapter does: PEFT on a fresh base, nothing of this project."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        fresh = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
        return PeftModel.from_pretrained(fresh, adapter, is_trainable=trainable).eval()


def random_batch(seed: int, prompts: list[int], completions: list[list[int]], *, sepa_lambda: float = 0.0) -> Batch:
    """prompts: their lengths; completions: of each prompt, the lengths of its completions."""
    rng = np.random.default_rng(seed)
    rollouts = tuple(
        Rollout(
            group=group,
            tokens_T=rng.integers(2, VOCAB, length),
            logprobs_T=rng.normal(-5, 1, length).astype(np.float32),
            advantage=float(np.float32(rng.normal())),
            planning_T=rng.random(length) < 0.3,
        )
        for group, lengths in enumerate(completions)
        for length in lengths
    )
    return Batch(tuple(rng.integers(2, VOCAB, length) for length in prompts), rollouts, sepa_lambda)


def with_logprobs(batch: Batch, logprobs: list[np.ndarray]) -> Batch:
    rollouts = zip(batch.rollouts, logprobs, strict=True)
    return dataclasses.replace(
        batch, rollouts=tuple(dataclasses.replace(r, logprobs_T=np.asarray(p, dtype=np.float32)) for r, p in rollouts)
    )


def separate_logprobs(model: nn.Module, batch: Batch, temperature: float) -> list[torch.Tensor]:
    """Log-probs [T, V] of each rollout by one plain forward over its prompt and itself: nothing packed or padded."""
    results = []
    for rollout in batch.rollouts:
        prompt = batch.prompts[rollout.group]
        logits = model(input_ids=torch.from_numpy(np.concatenate((prompt, rollout.tokens_T)))[None]).logits[0]
        results.append(torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1))
    return results
