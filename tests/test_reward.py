"""Rewards: which answer is judged, what counts as equal, and what happens when judging fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.boxed import last_box
from retrain.reward import open_scorer, score
from retrain.types import ConfigError, RetrainError, Score

BOMB = r"\boxed{9^{9^{9^9}}}"


@pytest.fixture(scope="module")
def math():
    """One pool for all tests that do not break it. Its limit allows for a machine that is busy with other tests."""
    with closing(open_scorer("math", workers=2, timeout_s=30.0)) as scorer:
        yield scorer


@pytest.fixture
def impatient():
    with closing(open_scorer("math", workers=2, timeout_s=1.0)) as scorer:
        yield scorer


# --- the box ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\fbox{42}", "42"),
        (r"\boxed {  42 }", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1, 2} and }", r"\{1, 2"),  # an escaped brace closes nothing
        (r"\boxed{a \\}", r"a \\"),  # a line break is no escape of the brace after it
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\fbox{1} then \boxed{2} then text", "2"),
        (r"\boxed{x = \boxed{5}}", "5"),
        ("\\boxed{line\none}", "line\none"),
        (r"\boxed{\text{yes}}", r"\text{yes}"),
        ("42", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed{42", None),
        (r"\boxed{1} and \boxed{2", None),  # cut off within its answer
        (r"\boxed{1} and \boxed{}", None),
        (r"\boxed 5", None),
        (r"\boxedfoo{5}", None),
        (r"\boxed{\}", None),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


balanced = st.recursive(
    st.text(st.characters(exclude_characters="\\{}"), max_size=5) | st.sampled_from([r"\{", r"\}", r"\\"]),
    lambda inner: st.lists(inner, max_size=4).map(lambda parts: "{" + "".join(parts) + "}" + "".join(parts)),
)


@given(st.text(max_size=20), balanced, st.text(max_size=20).filter(lambda text: "box" not in text))
def test_any_balanced_content_comes_back_whole(before, content, after):
    assert last_box(rf"{before} \boxed{{{content}}}{after}") == (content.strip() or None)


def test_many_unclosed_boxes_take_linear_time():
    assert last_box(r"\boxed{" * 300_000) is None


# --- match -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [
        (r"\boxed{42}", " 42\n", 1.0),
        (r"\boxed{42}", "43", 0.0),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 0.0),
        (r"\boxed{41} \boxed{42}", "42", 1.0),
        (r"\boxed{42} \boxed{41}", "42", 0.0),
        ("42", "42", 0.0),
        ("", "", 0.0),  # nothing is never equal to nothing
        (r"\boxed{}", "", 0.0),
        (r"\boxed{ }", " ", 0.0),
        (r"\boxed{", "", 0.0),
        (r"\boxed{None}", "None", 1.0),
    ],
)
def test_match(response, reference, value):
    assert score("match", [response], [reference]) == [value]


def test_match_of_nothing():
    assert score("match", [], []) == []


# --- math: what is equal ---------------------------------------------------------------------------------------------

EQUAL = [  # answer, reference
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\frac12", "0.5"),
    ("0.5", "1/2"),
    ("1/2", r"$\frac{1}{2}$"),
    (r"\text{yes}", "yes"),
    (r"\text{(B)}", "B"),
    (r"12\text{ cm}", "12"),
    ("12 cm", "12"),
    (r"90^\circ", "90"),
    (r"50\%", "50"),
    ("50%", "0.5"),
    (r"\$5", "5"),
    ("1,234", "1234"),
    (r"10{,}000", "10000"),
    (r"10,\!000", "10000"),
    (r"1\,234", "1234"),
    ("1 234 567", "1234567"),
    (r"[1,2)", r"\left[1, 2\right)"),
    (r"(-\infty, 3] \cup [5, \infty)", r"[5,\infty) \cup (-\infty,3]"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    ("2, 1", r"\{1,2\}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("x = 5", "5"),
    ("5", "x = 5"),
    ("x=1+4", "x=5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("3 > x", "x < 3"),
    (r"\frac{1}{3}", "0.333333"),
    ("2^{10}", "1024"),
    ("7", r"First \boxed{3}, so the answer is \boxed{7}."),
]

UNEQUAL = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("1,23", "123"),
    ("1234", "1,23,4"),
    ("235", r"1\,234"),  # not the mixed number 1 + 234
    ("0", "10 000"),  # nor a product
    ("[1,2]", "(1,2)"),
    ("[1,2)", "(1,2]"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ("y = 5", "x = 5"),
    ("5", "2x + z = 5"),
    ("x > 3", "x < 3"),
    (r"\text{no}", "yes"),
    ("7 or 8 or 9", "7"),
    ("!!", "7"),
    (r"\frac{", "7"),
    (r"\text{}", "7"),
    (r"\begin{matrix}1", "1"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_math_equal(math, answer, reference):
    assert math.score([rf"thus \boxed{{{answer}}}."], [reference]) == [Score(1.0)]


@pytest.mark.parametrize(("answer", "reference"), UNEQUAL)
def test_math_unequal(math, answer, reference):
    assert math.score([rf"thus \boxed{{{answer}}}."], [reference]) == [Score(0.0)]


def test_gold_goes_first(math):
    """math-verify turns a gold inequality into a set when the prediction is one, not the other way round."""
    interval, inequality = "(1,2)", "1 < x < 2"
    assert math.score([rf"\boxed{{{interval}}}", rf"\boxed{{{inequality}}}"], [inequality, interval]) == [
        Score(1.0),
        Score(0.0),
    ]


@pytest.mark.parametrize(
    "response",
    ["7", "$7$", "The final answer is $7$. I hope it is correct.", r"\boxed{}", r"\boxed{7", r"\boxed{8} or $7$", ""],
)
def test_only_the_last_box_counts(math, response):
    assert math.score([response], ["7"]) == [Score(0.0)]


@pytest.mark.parametrize("reference", ["", "  ", "!!", r"\boxed{", r"\boxed{}", "9" * 5000, r"\frac{1}{0}"])
def test_an_unusable_reference_is_an_error_for_every_answer(math, reference):
    scores = math.score([rf"\boxed{{{reference}}}", r"\boxed{1}"], [reference] * 2)
    assert scores[1].value is None and scores[1].error
    assert reference == r"\frac{1}{0}" or math.score(["no box"], [reference])[0].value is None


def test_scores_keep_their_places_and_equal_answers_are_judged_alike(math):
    responses = [rf"\boxed{{{n % 5}}}" for n in range(100)]
    references = [str(n % 3) for n in range(100)]
    assert [s.value for s in math.score(responses, references)] == [float(n % 5 == n % 3) for n in range(100)]
    assert math.score([], []) == []


def test_the_promised_function():
    responses = [r"\boxed{\frac{2}{4}}", r"\boxed{2}", r"\boxed{1}", "nothing"]
    assert score("math", responses, ["0.5", "1", "!!", "3"], workers=1) == [1.0, 0.0, None, 0.0]


# --- math: failures --------------------------------------------------------------------------------------------------


def worker_pids(parent: int) -> set[int]:
    """Processes that `parent` started to judge, by the kernel's table."""
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and "math_worker" in command:
            children.add(int(stat.parent.name))
    return children


@contextmanager
def one_worker(timeout_s: float = 30.0):
    """A scorer and the pid of its only worker, which has started."""
    others = worker_pids(os.getpid())
    with closing(open_scorer("math", workers=1, timeout_s=timeout_s)) as scorer:
        assert scorer.score([r"\boxed{1}"], ["1"]) == [Score(1.0)]
        (pid,) = worker_pids(os.getpid()) - others
        yield scorer, pid


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")


def test_a_power_tower_is_stopped_and_is_no_zero(impatient):
    start = time.monotonic()
    scores = impatient.score([BOMB, r"\boxed{3}"], ["3", "3"])
    assert scores[1] == Score(1.0)
    assert scores[0].value is None
    assert scores[0].error == "comparing '9^{9^{9^9}}' with the reference '3' took longer than 1 s"
    assert time.monotonic() - start < 10
    assert impatient.score([r"\boxed{4}"] * 2, ["4", "5"]) == [Score(1.0), Score(0.0)]


def test_bombs_of_size_and_depth(impatient):
    answers = ["7" * 10**6, "(" * 3000 + "1" + ")" * 3000, "{" * 60 + "1" + "}" * 60]
    for verdict in impatient.score([rf"\boxed{{{answer}}}" for answer in answers], ["3"] * 3):
        assert verdict.value in (None, 0.0) and (verdict.value is None) == (verdict.error is not None)
        assert verdict.error is None or len(verdict.error) < 300
    assert impatient.score([r"\boxed{4}"], ["4"]) == [Score(1.0)]


@needs_proc
def test_a_worker_that_is_killed_while_judging_is_an_error_and_is_replaced():
    with one_worker() as (scorer, pid):
        killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        killer.start()
        (verdict,) = scorer.score([BOMB], ["3"])
        killer.join()
        assert verdict.value is None and "died" in verdict.error and "SIGKILL" in verdict.error
        assert scorer.score([r"\boxed{4}"], ["4"]) == [Score(1.0)]


@needs_proc
def test_a_worker_that_died_between_questions_is_replaced_unnoticed():
    with one_worker() as (scorer, pid):
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not runs(pid), 5)
        assert scorer.score([r"\boxed{4}"], ["4"]) == [Score(1.0)]


@needs_proc
def test_a_stopped_worker_that_reads_nothing_is_a_time_out():
    with one_worker(timeout_s=1.0) as (scorer, pid):
        os.kill(pid, signal.SIGSTOP)
        (verdict,) = scorer.score([rf"\boxed{{{'1+' * 100_000}1}}"], ["3"])  # more than a pipe holds
        assert "took longer than 1 s" in verdict.error
        assert not runs(pid)


def test_several_threads_share_a_scorer(math):
    results: dict[int, list[Score]] = {}

    def work(thread: int) -> None:
        responses = [rf"\boxed{{{n}}}" for n in range(20)]
        results[thread] = math.score(responses, [str(thread)] * 20)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {t: [Score(float(n == t)) for n in range(20)] for t in range(6)}


@needs_proc
def test_workers_start_lazily_are_reused_and_end_on_close():
    before = worker_pids(os.getpid())
    scorer = open_scorer("math", workers=2)
    assert worker_pids(os.getpid()) == before
    scorer.score([r"\boxed{1}", r"\boxed{2}"], ["1", "2"])
    started = worker_pids(os.getpid()) - before
    assert 1 <= len(started) <= 2
    for n in range(5):
        scorer.score([rf"\boxed{{{n}}}"], ["1"])
    assert worker_pids(os.getpid()) - before == started
    scorer.close()
    scorer.close()
    assert worker_pids(os.getpid()) == before


HOLDER = """
import sys, threading, time
from retrain.reward import open_scorer
scorer = open_scorer("math", workers=1, timeout_s=1.0)
scorer.score([r"\\boxed{1}"], ["1"])
assert "torch" not in sys.modules and "sympy" not in sys.modules
print("ready", flush=True)
if sys.argv[1] == "idle":
    sys.stdin.read()
elif sys.argv[1] == "busy":
    while True:
        scorer.score([r"\\boxed{9^{9^{9^9}}}"], ["1"])
"""


@needs_proc
@pytest.mark.parametrize("state", ["exit", "idle", "busy"])
def test_no_worker_outlives_its_parent(state):
    """Neither when the parent ends without closing, nor when it is killed, waiting or in the middle of a question."""
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDER, state],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        workers = worker_pids(parent.pid) if parent.stdout.readline() == b"ready\n" else None
        if state == "exit":
            assert parent.wait(10) == 0
        else:
            assert len(workers) == 1
            time.sleep(0.3)
            workers = worker_pids(parent.pid)
            parent.kill()
    assert wait_until(lambda: not any(map(runs, workers)), 8)


def test_a_worker_that_cannot_start_stops_the_run(monkeypatch):
    monkeypatch.setattr("retrain.reward.math.WORKER", "retrain.reward.no_such_module")
    with (
        closing(open_scorer("math", workers=1)) as scorer,
        pytest.raises(RetrainError, match=r"did not start \(exit status 1\)"),
    ):
        scorer.score([r"\boxed{1}"], ["1"])


def test_the_worker_speaks_lines_and_ends_with_its_input():
    questions = [["1/2", "0.5"], ["1/2", None], ["!!", "1"], ["\ud800 x", "x"]]
    done = subprocess.run(
        [sys.executable, "-m", "retrain.reward.math_worker", "30"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
        input="".join(json.dumps(q) + "\n" for q in questions).encode(),
        capture_output=True,
        check=True,
    )
    ready, *verdicts = map(json.loads, done.stdout.splitlines())
    assert ready == {} and verdicts[:2] == [{"value": 1.0}, {"value": 0.0}]
    assert "'!!' is not a mathematical expression" in verdicts[2]["error"] and len(verdicts) == 4


# --- choosing a reward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["match", "math"])
def test_lengths_must_agree(kind):
    with closing(open_scorer(kind, workers=1)) as scorer, pytest.raises(ValueError):
        scorer.score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="2 responses but 1 references"):
        score(kind, ["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("judge", {}, 'reward.type = "judge": needs reward.judge_model'),
        ("custom", {}, 'reward.type = "custom": needs reward.custom_module'),
        ("maths", {}, 'reward.type = "maths": must be one of .*; did you mean "math"'),
        ("Match", {}, '"Match": must be one of .*; did you mean "match"'),
        ("xyz", {}, '"xyz": must be one of match, math, judge, custom$'),
        ("math", {"timeout": 5.0}, 'reward.timeout: unknown key; did you mean "timeout_s"'),
        ("math", {"workers": -1}, "workers = -1"),
        ("math", {"timeout_s": 0.0}, "timeout_s = 0"),
        ("math", {"timeout_s": float("nan")}, "timeout_s = nan"),
    ],
)
def test_unusable_rewards_are_config_errors(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        open_scorer(kind, **options)


def test_importing_is_cheap():
    heavy = ("torch", "transformers", "sympy", "pydantic")
    code = f"import sys, retrain.reward; print([m for m in {heavy} if m in sys.modules])"
    path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.stdout == b"[]\n"
