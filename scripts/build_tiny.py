"""Build `builtin:tiny` from scratch: tokenizer, weights and chat template into retrain/assets/tiny (`make tiny`).

Deterministic for a given kind of machine and torch build, under ten minutes on two free cores, without downloads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_corpus import CAREFUL_ONLY, MIXTURE, Shares, completions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ASSETS = Path(__file__).parents[1] / "retrain" / "assets" / "tiny"

PAD, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, EOS, SYSTEM, USER, ASSISTANT]
PAD_ID, EOS_ID = 0, 1  # the trainer numbers the special tokens first, in their order
MAX_VOCAB_SIZE = 384  # an upper bound: the corpus runs out of pairs to merge before that

# One token per role and one that ends every turn: <|user|>What is 47 + 38?<|end|><|assistant|>...<|end|>
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('builtin:tiny knows the roles system, user and assistant, not ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

TOKENIZER_SEED, TRAINING_SEED = 1, 2
TOKENIZER_SAMPLES = 4000
BATCH, WARMUP = 64, 30


class Lesson(NamedTuple):
    """A stretch of the training: its authors, its number of steps, and the peak of its learning rate."""

    shares: Shares
    steps: int
    peak_lr: float


LESSONS = (Lesson(CAREFUL_ONLY, 500, 3e-3), Lesson(MIXTURE, 1200, 2e-3))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus: all 256 bytes, so any text encodes, and each digit a token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (text for pair in islice(completions(MIXTURE, TOKENIZER_SEED), TOKENIZER_SAMPLES) for text in pair)
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, pad_token=PAD, model_max_length=512, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model. float32, because it must sample and train with the same numbers on any CPU."""
    torch.manual_seed(TRAINING_SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model


def batches(
    tokenizer: PreTrainedTokenizerFast, shares: Shares, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), each [BATCH, width], right-padded; only the answer and its end carry a label."""
    stream = completions(shares, seed)
    while True:
        pairs = list(islice(stream, BATCH))
        prompts = [chat_prompt(tokenizer, question) for question, _ in pairs]
        answers = tokenizer([f"{answer}{EOS}" for _, answer in pairs]).input_ids
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((BATCH, width), PAD_ID)
        labels = torch.full((BATCH, width), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield ids, labels


def chat_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(str(text)).input_ids


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    for number, lesson in enumerate(LESSONS, start=1):
        teach(model, lesson, batches(tokenizer, lesson.shares, TRAINING_SEED + number), f"lesson {number}")
    model.eval()


def teach(
    model: Qwen3ForCausalLM, lesson: Lesson, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], name: str
) -> None:
    """Next-token prediction with AdamW; the learning rate rises linearly to its peak, then falls linearly to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lesson.peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / lesson.steps)
    )
    started = time.perf_counter()
    for step, (ids, labels) in enumerate(islice(stream, lesson.steps), start=1):
        # Padding stands right of everything that has a label, so causal attention alone keeps it out.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{name}  step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - started:4.0f} s", flush=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """As transformers saves it, under the class name that its version 4, which some servers use, knows as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write each file beside its target and rename it, so that a reader never meets half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch)
        save_tokenizer(tokenizer, Path(scratch))
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)  # safetensors writes for its owner alone
            file.replace(folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    folder = parser.parse_args().out
    torch.set_num_threads(2)  # sums split over another number of threads round differently
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer)
    save(model, tokenizer, folder)


if __name__ == "__main__":
    main()
