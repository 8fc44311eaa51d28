"""The terminal view: plain lines off a terminal, a live panel on one, and text of the model's shown as it is."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from retrain.config.build import build
from retrain.tracking.console import SHOWN_CHARACTERS, SHOWN_LINES, ConsoleObserver, clock, number, percent
from retrain.tracking.summary import closing_summary


@pytest.fixture(autouse=True)
def clock_at(monkeypatch):
    """The time that the view reads; it stands still unless a test moves it."""
    now = [1000.0]
    monkeypatch.setattr("retrain.tracking.console.monotonic", lambda: now[0])
    return now


def metrics(step=1, **keys):
    return {
        "step": step,
        "correct_rate": 0.375,
        "running_correct_rate": 0.5,
        "mean_reward": 0.25,
        "loss": -0.0123,
        "entropy_mean": 1.5,
        "tokens_per_s": 1234.4,
        "step_time_s": 2.0,
        "reward_errors": 0,
        "eval_correct_rate": None,
    } | keys


def sample(completion="47 + 38 = 85", **keys):
    return {"prompt": "What is 47 + 38?", "completion": completion, "reward": 1.0} | keys


def terminal(**keys):
    settings = {"width": 100, "height": 40, "force_terminal": True, "force_interactive": True} | keys
    return Console(file=io.StringIO(), highlight=False, _environ={"TERM": "xterm"}, **settings)


def shown(console):
    """What was written, without the codes for colours and the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def panel(*generations, console=None, step_metrics=None, max_steps=60):
    console = console or terminal()
    with ConsoleObserver(max_steps, console=console) as observer:
        observer.on_step(step_metrics or metrics(), list(generations))
    return shown(console)


# ---------------------------------------------------------------- off a terminal


def plain(max_steps=60, *steps):
    console = Console(file=io.StringIO(), width=40)
    with ConsoleObserver(max_steps, console=console) as observer:
        for each in steps or (metrics(),):
            observer.on_step(each, [sample("[/] not shown")])
    return console.file.getvalue()


def test_one_plain_line_a_step():
    text = plain(60, metrics(1), metrics(2))
    first, second = text.splitlines()
    assert "\x1b" not in text
    assert first.startswith("step  1/60")
    assert second.startswith("step  2/60")
    for fact in (
        "correct 37.5%",
        "last 10: 50.0%",
        "reward 0.25",
        "loss -0.0123",
        "entropy 1.5",
        "1234 tok/s",
        "1:58 left",
    ):
        assert fact in first
    assert "errors" not in first
    assert "eval" not in first


def test_what_is_missing_and_what_is_seldom():
    empty = dict.fromkeys(("correct_rate", "running_correct_rate", "mean_reward", "loss", "entropy_mean"))
    line = plain(60, metrics(**empty, reward_errors=3, eval_correct_rate=0.8125))
    assert "correct -" in line
    assert "reward -" in line
    assert "3 reward errors" in line
    assert "eval 81.2%" in line


def test_say_is_neither_folded_nor_interpreted():
    console = Console(file=io.StringIO(), width=20)
    line = "into logs/[bold]/[/] :100: " + "x" * 60
    ConsoleObserver(3, console=console).say(line)
    assert console.file.getvalue() == line + "\n"


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    console = Console(file=io.StringIO(), force_terminal=True, width=200, _environ={"TERM": "dumb"})
    with ConsoleObserver(60, console=console) as observer:
        observer.on_step(metrics(), [sample()])
        assert "step  1/60" in shown(console)


# ---------------------------------------------------------------- on a terminal


def test_the_panel_says_it_all():
    text = panel(sample("first"), sample("47 + 38 = 85"))
    for fact in (
        "step 1/60",
        "1:58 left",
        "correct 37.5%",
        "last 10 50.0%",
        "reward 0.25",
        "1234 tok/s",
        "entropy 1.5",
    ):
        assert fact in text
    assert "What is 47 + 38?" in text
    assert "47 + 38 = 85" in text, "the last sampled completion"
    assert "first" not in text
    assert "could not be computed" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_facts_are_not_broken_whatever_the_width(width):
    text = panel(sample(), console=terminal(width=width))
    for fact in ("correct 37.5%", "last 10 50.0%", "reward 0.25", "loss -0.0123", "entropy 1.5", "1234 tok/s"):
        assert fact in text


def test_the_panel_without_samples_and_with_errors():
    text = panel(step_metrics=metrics(reward_errors=4, mean_reward=None))
    assert "reward -" in text
    assert "4 rewards could not be computed" in text


@pytest.mark.parametrize("text", ["[bold]", "[/]", "[/bold]", "[red]x[/red]", "[link=http://a]", ":100:", "\\[", "[]"])
def test_markup_in_a_completion_is_text(text):
    assert text in panel(sample(f"a {text} b", prompt=f"p {text} q"))


def test_control_codes_do_not_reach_the_terminal():
    console = terminal()
    panel(sample("clear \x1b[2J title \x1b]0;owned\x07 back \b\r \x9b2J \u202e end"), console=console)
    raw = console.file.getvalue()
    assert "\x1b[2J" not in raw
    for code in ("\x1b]0", "\x07", "\b", "\x9b", "\u202e"):
        assert code not in raw
    assert "owned" in raw


def test_long_texts_leave_room_for_the_rest():
    text = panel(sample("c\n" * 300, prompt="\n".join(f"line {i}" for i in range(300))))
    assert len(text.splitlines()) < 30
    assert "line 299" in text, "the end of the prompt"
    assert f"line {299 - SHOWN_LINES}\n" not in text
    assert "z" * 90 in panel(sample("z" * 5000))
    assert panel(sample("z" * 5000)).count("z") % SHOWN_CHARACTERS == 0


def test_an_old_terminal_gets_replacements():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    console = Console(file=file, force_terminal=True, force_interactive=True, width=80, _environ={"TERM": "xterm"})
    with ConsoleObserver(60, console=console) as observer:
        observer.on_step(metrics(), [sample("caf\u00e9 \U0001f600")])
    file.flush()
    assert b"caf? ?" in file.buffer.getvalue()


def test_saying_something_above_the_panel():
    console = terminal()
    with ConsoleObserver(60, console=console) as observer:
        observer.say("loading [/] the model")
        observer.on_step(metrics(), [sample()])
        observer.say("checkpoint [bold]")
    text = shown(console)
    assert text.index("loading [/] the model") < text.index("step 1/60")
    assert "checkpoint [bold]" in text
    assert console.file.getvalue().endswith("\x1b[?25h"), "the cursor is given back"


def test_time_left_counts_this_session_only(clock_at):
    """Resumed at step 40 of 60: two seconds a step, so 36 after one step and 34 after two."""
    observer = ConsoleObserver(60, console=Console(file=io.StringIO()))
    clock_at[0] = 1100.0  # a long load
    observer.on_step(metrics(41), [])
    assert observer.seconds_left(41) == pytest.approx(2 * 19)
    clock_at[0] = 1104.0  # the second step took four seconds
    observer.on_step(metrics(42), [])
    assert observer.seconds_left(42) == pytest.approx(3 * 18)
    assert observer.seconds_left(60) == 0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36_061, "10:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_numbers():
    assert (number(None), number(0.0), number(1234.5), number(-1e-7)) == ("-", "0", "1.23e+03", "-1e-07")
    assert (percent(None), percent(0.0), percent(1.0), percent(0.1234)) == ("-", "0.0%", "100.0%", "12.3%")


# ---------------------------------------------------------------- the closing summary


def write_metrics(folder, rates):
    lines = (
        f'{{"step": {i}, "correct_rate": {rate}, "completion_tokens": 10, "step_time_s": 0.5}}\n'
        for i, rate in enumerate(rates, start=1)
    )
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_closing_summary(tmp_path):
    log_dir = tmp_path / "my run"
    log_dir.mkdir()
    config = build({"model": {"model": "org/name"}, "training": {"max_steps": 30}})
    write_metrics(log_dir, [0.2] * 9 + ["null"] + [0.4] * 10 + [0.9] * 10)
    text = "\n".join(closing_summary(config, log_dir))
    assert "20.0% in the first 10 steps, 90.0% in the last 10" in text
    assert "30 steps, 300 sampled tokens in 0:15" in text
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('org/name'), '{log_dir}/final')" in text
    assert f"retrain '{log_dir}/config.toml' --resume '{log_dir}' --max-steps 60" in text, "as a shell takes it"


def test_closing_summary_of_a_short_run_and_of_none(tmp_path):
    config = build({})
    assert closing_summary(config, tmp_path) == []
    write_metrics(tmp_path, ["null", 0.5])
    assert any("50.0% in the first 2 steps, 50.0% in the last 2" in line for line in closing_summary(config, tmp_path))
    write_metrics(tmp_path, ["null"])
    assert any("- in the first 1 steps" in line for line in closing_summary(config, tmp_path))
