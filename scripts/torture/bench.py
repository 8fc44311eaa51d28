"""The small run that everything is tried on, the one that was left alone, and a list of what came out."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain.training.checkpoint import CHECKPOINTS
from scripts.torture.command import Forks, Outcome, Wrong
from scripts.torture.compare import differences

# As small as it gets with everything in it that a resume must bring back: dropout, a learning-rate schedule, SEPA's
# gate and controller, planning tokens, dynamic sampling, evaluation, several epochs, checkpoints of which old ones go.
CONFIG = """
[backend]
devices = "cpu"
[model]
model = "builtin:tiny"
lora_rank = 4
[lora]
dropout = 0.1  # so that the global random streams matter
[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo_sepa_hicra"
dynamic_sampling = true
max_resample_rounds = 1
[planning]
detector = "regex"
[training]
seed = 11
max_steps = 6
batch_size = 2
group_size = 4
max_tokens = 10
temperature = 1.0
lr = 1e-3
save_every = 2
keep_checkpoints = 2
micro_batch_tokens = 64
gradient_checkpointing = false
lr_schedule = "cosine"
[sepa]
steps = 4
delay_steps = 1
correct_rate_gate = 0.04
schedule = "auto"
warmup = 2
[eval]
every = 3
examples = 2
[data]
source = "{data}"
eval_fraction = 0.3
[logging]
log_dir = "{log_dir}"
strategic_grams = "guess, must be, think"
"""


class OutOfTime(Exception):
    """The time that was given is over."""


@dataclass
class Bench:
    """log_dir: where every trial runs, one after another. whole: a copy of the run that nobody disturbed.

    cpu_seconds, points: its processor time in a fork, and the changes that it made to its folder; fresh_seconds: in a
    process of its own. tried: trials by their name;
    skipped: why some could not be made; wrong: what was not as promised, with the folder that shows it.
    """

    root: Path
    seed: int
    deadline: float = float("inf")
    points: tuple[str, ...] = ()
    cpu_seconds: float = 0.0
    fresh_seconds: float = 0.0
    tried: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.log_dir, self.whole = self.root / "run", self.root / "whole"
        self.config = self.root / "config.toml"
        data = self.root / "sums.jsonl"
        sums = ({"prompt": f"What is {a} + {a + 21}?", "reference": str(2 * a + 21)} for a in range(30, 46))
        data.write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
        text = CONFIG.replace("{log_dir}", str(self.log_dir)).replace("{data}", str(data))
        self.config.write_text(text, encoding="utf-8")
        self.run = Forks(self.root / "printed")

    @contextmanager
    def trial(self, name: str, detail: str = "", *, begun: bool = False) -> Iterator[None]:
        """One trial in a folder that is empty, or (begun) holds the finished run. Wrong is noted, not raised.

        Raises OutOfTime once the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime
        shutil.rmtree(self.log_dir, ignore_errors=True)
        if begun:
            shutil.copytree(self.whole, self.log_dir)
        self.tried[name] += 1
        try:
            yield
        except Wrong as error:
            kept = self.root / f"wrong-{sum(map(len, self.wrong.values())) + 1}"
            if self.log_dir.exists():
                self.log_dir.rename(kept)
            self.wrong.setdefault(name, []).append(f"{detail} ({kept}):\n{error}")

    def again(self, *words: object, **how: Any) -> Outcome:
        """What a user does after a crash: the same command again and, where that is refused, what it says instead."""
        outcome = self.run(*words or (self.config,), **how)
        return self.run(*outcome.advice, **how) if outcome.status == 2 else outcome

    def same_as_whole(self, log_dir: Path | None = None, *, config: bool = True, but: Collection[Path] = ()) -> None:
        """Raises Wrong where the run differs from the undisturbed one (`differences`)."""
        found = differences(self.whole, log_dir or self.log_dir, config=config, but=but)
        if found:
            raise Wrong("not the run that was left alone:\n" + "\n".join(found))

    def older_checkpoints(self) -> list[Path]:
        """Of the run and of the undisturbed one, all but the newest, relative to both."""
        found = [sorted((run / CHECKPOINTS).iterdir())[:-1] for run in (self.log_dir, self.whole)]
        return [Path(CHECKPOINTS, folder.name) for folder in (*found[0], *found[1])]
