"""The terminal view of a run: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from retrain.redact import shown
from retrain.training.metrics import CORRECT, RUNNING_STEPS

# Of a prompt's end and of a completion's beginning, so that the panel stays within a small terminal.
SHOWN_CHARACTERS = 400
SHOWN_LINES = 6


class ConsoleObserver:
    """See `retrain.training.loop.Observer`. Use as a context manager, so that the live panel is taken down."""

    def __init__(self, max_steps: int, *, console: Console | None = None) -> None:
        self.max_steps = max_steps
        self.console = console or Console(file=sys.stdout, highlight=False)
        self._began = monotonic()
        self._first_step: int | None = None
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_interactive else None

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        # A path or a prompt may look like markup ("[/]") or an emoji code (":100:"), and is shown as it is.
        self.console.print(shown(line), markup=False, emoji=False, soft_wrap=True)

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        if self._first_step is None:
            self._first_step = metrics["step"] - 1
            self._began = monotonic() - metrics["step_time_s"]
        if self._live is None:
            self.say(self._line(metrics))
            return
        if not self._live.is_started:
            self._live.start()
        self._live.update(self._panel(metrics, generations[-1] if generations else None))

    def seconds_left(self, step: int) -> float:
        """From the pace of this session's steps, evaluations and checkpoints included."""
        done = step - (self._first_step or 0)
        return (monotonic() - self._began) / done * (self.max_steps - step)

    def _line(self, metrics: dict[str, Any]) -> str:
        parts = [
            f"step {metrics['step']:>{len(str(self.max_steps))}}/{self.max_steps}",
            f"correct {percent(metrics['correct_rate'])}",
            f"(last {RUNNING_STEPS}: {percent(metrics['running_correct_rate'])})",
            f"reward {number(metrics['mean_reward'])}",
            f"loss {number(metrics['loss'])}",
            f"entropy {number(metrics['entropy_mean'])}",
            f"{metrics['tokens_per_s']:.0f} tok/s",
            f"{clock(self.seconds_left(metrics['step']))} left",
        ]
        if metrics["reward_errors"]:
            parts.append(f"{metrics['reward_errors']} reward errors")
        if metrics["eval_correct_rate"] is not None:
            parts.append(f"eval {percent(metrics['eval_correct_rate'])}")
        return "  ".join(parts)

    def _panel(self, metrics: dict[str, Any], sample: dict[str, Any] | None) -> Panel:
        facts = (
            f"correct [bold]{percent(metrics['correct_rate'])}[/]",
            f"last {RUNNING_STEPS} [bold]{percent(metrics['running_correct_rate'])}[/]",
            f"reward {number(metrics['mean_reward'])}",
            f"loss {number(metrics['loss'])}",
            f"entropy {number(metrics['entropy_mean'])}",
            f"{metrics['tokens_per_s']:.0f} tok/s",
        )
        # Columns, unlike one line, breaks between facts where the terminal is narrow.
        parts: list[Any] = [
            Padding(ProgressBar(total=self.max_steps, completed=metrics["step"]), 0),  # alone, it ends no line
            Columns([Text.from_markup(fact) for fact in facts], padding=(0, 3)),
        ]
        if metrics["reward_errors"]:
            parts.append(Text(f"{metrics['reward_errors']} rewards could not be computed", style="red"))
        if sample is not None:
            style = "green" if (sample["reward"] or 0) > CORRECT else "red"
            prompt, completion = sample["prompt"][-SHOWN_CHARACTERS:], sample["completion"][:SHOWN_CHARACTERS]
            parts += [
                Text(self._shown(prompt, slice(-SHOWN_LINES, None)), style="dim"),
                Text(self._shown(completion, slice(SHOWN_LINES)), style=style),
            ]
        left = clock(self.seconds_left(metrics["step"]))
        return Panel(Group(*parts), title=f"step {metrics['step']}/{self.max_steps}, {left} left", title_align="left")

    def _shown(self, text: str, lines: slice) -> str:
        """Text of the model's for the terminal."""
        encodable = shown(text).encode(self.console.encoding, "replace").decode(self.console.encoding)
        return "\n".join(encodable.splitlines()[lines])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def points(difference: float | None) -> str:
    """A difference of rates, in points."""
    return "-" if difference is None else f"{100 * difference:+.1f}"


def interval(estimate: Mapping[str, Any], show: Callable[[float], str]) -> str:
    return "-" if estimate["low"] is None else f"{show(estimate['low'])} to {show(estimate['high'])}"


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def compared(comparison: Mapping[str, Any]) -> list[str]:
    """A comparison of results.json as the cells of a table: difference, interval, both p, seeds needed, verdict."""
    seeds = comparison["seeds_needed"]
    return [
        points(comparison["mean"]),
        interval(comparison, points),
        p_value(comparison["p_t_holm"]),
        p_value(comparison["p_flip_holm"]),
        "-" if seeds is None else f"{seeds:,}",
        comparison["verdict"],
    ]


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
