"""A whole GRPO step (sample, score, train) of this engine beside TRL's GRPOTrainer, in one process and in turns.

    pip install trl
    OMP_NUM_THREADS=1 python benchmarks/grpo_step.py

Same model, same LoRA adapter at the start, same prompts in the same order, same reward, same number of completions that
are trained on: ours is told to keep groups whose rewards are all equal, which it would leave out by default. After each
step of TRL's trainer comes one of ours. Exit status 0 only where the target is met.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from rounds import clock, ratio, write
from transformers import AutoModelForCausalLM, TrainerCallback

from retrain import data, reward
from retrain.assets import resolve_model
from retrain.config import Config
from retrain.config.build import build
from retrain.training.interrupt import Interrupts
from retrain.training.loop import Run, run_steps
from retrain.training.records import last_row
from retrain.training.run import LogObserver, open_run

TARGET = 0.5


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if importlib.util.find_spec("trl") is None:
        sys.exit("this benchmark needs TRL: pip install trl")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        config = build({}, overrides=overrides(args, Path(scratch, "ours")))
        turns = Turns(open_run(config, None, Interrupts(), LogObserver(), opened))
        trainer = trl_trainer(config, turns, Path(scratch, "theirs"), args)
        trainer.add_callback(turns)
        trainer.train()
        row = last_row(Path(scratch, "ours", "metrics.jsonl"))
    ours, theirs = turns.ours[1:], turns.theirs[1:]  # the first step of each warms up
    share = ratio(ours, theirs)
    print(
        f"{args.model}: {args.batch} prompts x {args.group} completions of at most {args.max_tokens} tokens, LoRA rank"
    )
    print(f"{args.rank}, {torch.get_num_threads()} thread(s), {len(ours)} steps of each in turns; seconds, median\n")
    print(f"  ours           {median(ours):6.2f}  tokens {turns.our_tokens}")
    print(f"  TRL            {median(theirs):6.2f}  tokens {turns.their_tokens}")
    if row is not None:
        stages = ", ".join(f"{stage} {row[f'{stage}_time_s']:.2f}" for stage in ("sample", "reward", "train", "sync"))
        print(f"  ours, last step by the wall clock: {stages}")
    met = share <= TARGET
    print(f"\nours takes {share:.2f} of TRL's time; target {TARGET:g}: {'met' if met else 'NOT MET'}")
    figures = {"ours": ours, "trl": theirs, "share": share, "target": TARGET, "met": met}
    tokens = {"our_tokens": turns.our_tokens, "their_tokens": turns.their_tokens}
    write(args.json, {"settings": vars(args), "trl_version": version("trl"), "seconds": figures} | tokens)
    return 0 if met else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--device", default="cpu", help="as in [backend] devices")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", metavar="PATH", help="write the record here")
    return parser.parse_args(argv)


def overrides(args: argparse.Namespace, log_dir: Path) -> dict[str, Any]:
    return {
        "model.model": args.model,
        "model.lora_rank": args.rank,
        "backend.devices": args.device,
        "data.source": args.data,
        "data.shuffle": False,
        "algorithm.advantage_mode": "grpo",
        "algorithm.transform_mode": "none",
        "algorithm.skip_uniform_groups": False,
        "training.seed": 1,
        "training.batch_size": args.batch,
        "training.group_size": args.group,
        "training.max_tokens": args.max_tokens,
        "training.max_steps": 1,
        "training.temperature": 1.0,
        "training.lr": args.lr,
        "training.gradient_checkpointing": False,
        "training.save_every": 10**6,
        "logging.log_dir": str(log_dir),
    }


@dataclass
class Turns(TrainerCallback):
    """Times each step of TRL's trainer, and lets ours make one after it. Seconds, and the tokens of the last step."""

    run: Run
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    our_tokens: int = 0
    their_tokens: int = 0
    start: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.theirs.append(clock() - self.start)
        start = clock()
        run = self.run
        steps = run.config.training.model_copy(update={"max_steps": run.state.step + 1})
        run.config = run.config.model_copy(update={"training": steps})
        before = run.state.completion_tokens
        run_steps(run)
        self.our_tokens = run.state.completion_tokens - before
        self.ours.append(clock() - start)


def trl_trainer(config: Config, turns: Turns, folder: Path, args: argparse.Namespace) -> Any:
    """GRPOTrainer on the same base with a copy of our adapter, its prompts the text of ours."""
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")
    run, adapter = turns.run, folder / "adapter"
    adapter.mkdir(parents=True)
    run.backend.save_adapter(adapter)
    tokenizer = run.backend.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = AutoModelForCausalLM.from_pretrained(resolve_model(config.model.model), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    count = (args.steps + 1) * args.batch
    examples = data.load(config.data, max_examples=count).train
    prompts = [tokenizer.decode(ids) for ids in run.pipeline.collector.rollouts.prompt_tokens[:count]]
    for text, ids in zip(prompts, run.pipeline.collector.rollouts.prompt_tokens, strict=False):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    rows = [{"prompt": text, "reference": e.reference} for text, e in zip(prompts, examples, strict=True)]

    def score(completions: list[str], reference: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        turns.their_tokens = sum(map(len, completion_ids))
        return [value or 0.0 for value in reward.score("match", completions, reference)]

    settings = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch * args.group,
        gradient_accumulation_steps=1,
        num_generations=args.group,
        max_completion_length=args.max_tokens,
        max_steps=args.steps + 1,
        temperature=1.0,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        beta=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=args.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=score,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    sys.exit(main())
