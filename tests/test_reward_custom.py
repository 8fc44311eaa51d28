"""The `custom` reward: a function of the user's own, which may return or do anything."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.config import build
from retrain.reward import open_rewards, open_scorer, score
from retrain.reward.custom import LOOP_GRACE_S, _checked
from retrain.types import ConfigError, RetrainError, Score
from runs import lines, retrain, write_config

_names = (f"reward_module_{n}" for n in count())

HEADER = "import asyncio, math, sys, threading, time\nimport numpy as np\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and returns its name, another one each time."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(code):
        name = next(_names)
        (tmp_path / f"{name}.py").write_text(HEADER + code)
        return name

    return make


@pytest.fixture
def custom(module):
    """Opens the reward of a module that holds `code`."""
    return lambda code, **keys: open_scorer("custom", custom_module=module(code), **keys)


def ask(scorer, responses, references=None):
    with closing(scorer):
        return scorer.score(responses, references or ["r"] * len(responses))


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_scores_keep_their_places(custom, kind):
    code = f"{kind} score(response, reference):\n    return int(response) / 2 + len(reference)"
    responses = [str(n) for n in range(300)]
    assert ask(custom(code), responses, ["r" * (n % 3) for n in range(300)]) == [
        Score(n / 2 + n % 3) for n in range(300)
    ]
    assert ask(custom(code), []) == []


def test_the_promised_function(module):
    name = module("def mine(response, reference): return response == reference")
    assert score("custom", ["a", "b"], ["a", "a"], custom_module=name, custom_function="mine") == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"has no 'score'"):
        score("custom", ["a"], ["a"], custom_module=name)


@pytest.mark.parametrize(
    ("value", "number"),
    [("1", 1.0), ("True", 1.0), ("0.25", 0.25), ("-3", -3.0), ("np.float32(0.5)", 0.5), ("np.bool_(True)", 1.0)],
)
def test_what_is_a_number(custom, value, number):
    assert ask(custom(f"def score(response, reference): return {value}"), ["x"]) == [Score(number)]


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return math.nan", "returned nan, which is not finite"),
        ("return math.inf", "returned inf, which is not finite"),
        ("return np.float32('-inf')", "returned -inf, which is not finite"),
        ("return 10**400", "returned inf, which is not finite"),
        ("return None", "returned NoneType, not a number"),
        ("return '1.0'", "returned str, not a number"),
        ("return [1.0]", "returned list, not a number"),
        ("return np.ones(1)", "returned ndarray, not a number"),
        ("return 1j", "returned complex, not a number"),
        ("raise ValueError('no answer')", "raised ValueError: no answer"),
        ("raise asyncio.CancelledError", "ancelled"),
        ("raise TimeoutError('of its own')", "raised TimeoutError: of its own"),
        ("sys.exit(3)", "3"),
        ("raise KeyboardInterrupt('stop')", "stop"),
        ("raise RuntimeError('x' * 10_000)", "raised RuntimeError: xxx"),
    ],
)
def test_an_error_is_an_error_and_no_zero(custom, kind, body, reason):
    code = f"{kind} score(response, reference):\n    if response == 'good': return 0.5\n    {body}"
    scores = ask(custom(code), ["good", "bad", "good"])
    assert [s.value for s in scores] == [0.5, None, 0.5]
    assert reason in scores[1].error and "reward_module_" in scores[1].error
    assert len(scores[1].error) <= 300


def test_a_coroutine_where_a_number_is_expected(custom):
    code = "class Awaitable:\n    def __await__(self): yield\ndef score(response, reference): return Awaitable()"
    assert "write it as `async def`" in ask(custom(code), ["x"])[0].error


@given(st.floats() | st.integers() | st.booleans() | st.text() | st.none() | st.lists(st.floats(), max_size=1))
def test_a_score_is_finite_or_an_error(value):
    verdict = _checked(value, "f")
    assert (verdict.value is None) == (verdict.error is not None)
    assert verdict.value is None or (math.isfinite(verdict.value) and verdict.value == float(value))


def test_a_function_that_hangs_is_an_error_and_its_thread_is_left_behind(custom):
    scorer = custom(
        "def score(response, reference):\n    if response == 'hang': time.sleep(1000)\n    return 1.0", timeout_s=0.5
    )
    began = time.monotonic()
    with closing(scorer):
        scores = scorer.score(["hang", *["good"] * 50, "hang"], ["r"] * 52)
        assert time.monotonic() - began < 5
        assert [s.value for s in scores] == [None, *[1.0] * 50, None]
        assert scores[0].error.endswith(".score took longer than 0.5 s")
        assert scorer.figures() == {"custom_threads_abandoned": 2}
        assert scorer.score(["good"], ["r"]) == [Score(1.0)]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "custom-reward")


def test_too_many_threads_left_behind_stop_the_run(custom, monkeypatch):
    monkeypatch.setattr("retrain.reward.custom.MOST_ABANDONED", 3)
    scorer = custom("def score(response, reference): time.sleep(1000)", timeout_s=0.1)
    with closing(scorer), pytest.raises(RetrainError, match="still hold their threads"):
        scorer.score(["x"] * 4, ["r"] * 4)


def test_async_calls_run_together_and_are_cancelled_when_over_time(custom):
    code = (
        "ended = []\n"
        "async def score(response, reference):\n"
        "    try: await asyncio.sleep(float(response))\n"
        "    finally: ended.append(response)\n"
        "    return 1.0\n"
    )
    scorer = custom(code, timeout_s=1.0)
    began = time.monotonic()
    scores = ask(scorer, ["0.4"] * 60 + ["1000"])
    assert time.monotonic() - began < 4  # one after another: 24 s
    assert [s.value for s in scores] == [1.0] * 60 + [None]
    assert scores[-1].error.endswith("took longer than 1 s")
    assert scorer.abandoned == 0


def test_the_event_loop_stays_from_step_to_step(custom):
    code = (
        "loops = set()\n"
        "async def score(response, reference):\n"
        "    loops.add(asyncio.get_running_loop())\n"
        "    return len(loops)\n"
    )
    with closing(custom(code)) as scorer:
        assert [scorer.score(["x"], ["r"])[0].value for _ in range(3)] == [1, 1, 1]


def test_an_async_function_that_blocks_its_loop_hangs_nothing(custom):
    code = (
        "async def score(response, reference):\n"
        "    if response == 'block': time.sleep(4)\n"
        "    await asyncio.sleep(0)\n"
        "    return 1.0\n"
    )
    with closing(custom(code, timeout_s=0.3)) as scorer:
        began = time.monotonic()
        (verdict,) = scorer.score(["block"], ["r"])
        assert time.monotonic() - began < 0.3 + LOOP_GRACE_S + 1
        assert "without `await`" in verdict.error
        assert scorer.score(["good"] * 3, ["r"] * 3) == [Score(1.0)] * 3
        assert scorer.abandoned == 1
        time.sleep(3)  # the blocked loop ends by itself: nothing is left that would warn


def test_a_hanging_function_does_not_keep_the_process(tmp_path):
    (tmp_path / "hanging.py").write_text("import time\ndef score(response, reference): time.sleep(1000)")
    code = (
        "from retrain.reward import score; print(score('custom', ['x'], ['r'], custom_module='hanging', timeout_s=0.2))"
    )
    path = {"PYTHONPATH": f"{Path.cwd()}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"[None]\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(response): return 1.0", r"called with \(response, reference\), but its signature is \(response\)"),
        ("def score(response, reference, prompt): return 1.0", "missing a required argument: 'prompt'"),
        ("score = 3", "'score' is int, not a function"),
        ("1 / 0", "cannot import 'reward_module_.*ZeroDivisionError"),
    ],
)
def test_unusable_functions(custom, code, message):
    with pytest.raises(ConfigError, match=message) as refused:
        custom(code)
    assert str(refused.value).startswith("reward.custom_module + custom_function = ")


def test_a_missing_module_stops_before_anything_is_written(tmp_path):
    flags = ("--reward-type", "custom", "--custom-module", "no_such_module")
    done = retrain(write_config(tmp_path, tmp_path / "run"), *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert 'reward.custom_module + custom_function = "no_such_module.score": cannot import' in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_with_errors_stops_at_the_rate_and_goes_on_from_its_last_step(tmp_path):
    """Three quarters of the rewards of step 2 fail: step 1 is kept, and with a fixed function the run goes on."""
    code = (
        "calls = 0\n"
        "def score(response, reference):\n"
        "    global calls\n    calls += 1\n"
        "    if calls == 1 or calls > 10: raise ValueError('broken')\n"
        "    return calls % 2\n"
    )
    (tmp_path / "flaky.py").write_text(code)
    config = write_config(tmp_path, tmp_path / "run", '[reward]\ntype = "custom"\ncustom_module = "flaky"\n')
    done = retrain(config, cwd=tmp_path)
    assert done.returncode == 1
    assert "6 of 8 rewards of a step could not be computed, more than reward.max_error_rate = 0.5" in done.stderr
    assert "6 x flaky.score raised ValueError: broken" in done.stderr
    assert "Checkpoint of step 1 written" in done.stderr
    (step,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert (step["step"], step["reward_errors"], step["custom_threads_abandoned"]) == (1, 1, 0)
    generations = lines(tmp_path / "run" / "generations.jsonl")
    assert [row["error"] for row in generations].count("flaky.score raised ValueError: broken") == 1
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["checkpoint"].endswith("000001")

    resume = (tmp_path / "run" / "config.toml", "--resume", tmp_path / "run")
    again = retrain(*resume, "--max-error-rate", 1, "--max-steps", 3, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [row["reward_errors"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 1, 6]


def test_a_part_that_cannot_be_opened_closes_the_others(module):
    good = module("async def score(response, reference): return 1.0")
    parts = [{"type": "custom", "custom_module": good}, {"name": "b", "type": "custom", "custom_module": "no_such"}]
    section = build({"algorithm": {"advantage_mode": "grpo"}, "reward": {"parts": parts}}).reward
    with pytest.raises(ConfigError, match="no_such"):
        open_rewards(section)
