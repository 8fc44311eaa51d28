"""The algorithm package: group advantages, token credit, uncertainty, the SEPA schedule, the overlong penalty."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from retrain.algorithm import episode, transform, uncertainty
from retrain.algorithm.episode import group_advantages, is_uniform
from retrain.algorithm.overlong import overlong_penalty
from retrain.algorithm.sepa import SepaController
from retrain.algorithm.transform import token_credit
from retrain.algorithm.uncertainty import resolve, token_uncertainty
from retrain.types import ConfigError, RetrainError

SECTION = {
    "steps": 10,
    "schedule": "linear",
    "delay_steps": 5,
    "correct_rate_gate": 0.0,
    "ema_decay": 0.99,
    "variance_threshold": 0.2,
    "warmup": 50,
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes source as a module of its own and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source, name="users_plugin"):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


# ---- episode advantages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", episode.MODES)
def test_errors_leave_their_group_before_the_mean(mode):
    rewards = [[1.0, None, 0.0, 0.0], [None, 1.0], [0.0, 1.0], [None, None], []]
    lengths = [[3, 9, 1, 2], [4, 4], [5, 1], [1, 1], []]
    got = group_advantages(rewards, lengths, mode=mode)
    want = oracle.episode_advantages([1.0, 0.0, 0.0, 0.0, 1.0], [0, 0, 0, 2, 2], [3, 1, 2, 5, 1], mode)
    assert got[0] == [pytest.approx(want[0], rel=1e-6), None, *(pytest.approx(w, rel=1e-6) for w in want[1:3])]
    assert got[2] == pytest.approx(want[3:], rel=1e-6)
    assert (got[1], got[3], got[4]) == ([None, None], [None, None], [])


def test_a_group_of_one_is_zero_and_one_left_over_is_dropped():
    assert group_advantages([[1.0], [1.0, None], [None]], [[3], [3, 3], [3]], mode="grpo") == [
        [0.0],
        [None, None],
        [None],
    ]


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.lists(st.none() | st.sampled_from([0.0, 0.5, 1.0]), max_size=6), max_size=6),
    mode=st.sampled_from(episode.MODES),
)
def test_group_advantages_match_the_oracle(rewards, mode):
    lengths = [[i + 2 * g for i in range(len(group))] for g, group in enumerate(rewards)]
    got = group_advantages(rewards, lengths, mode=mode)
    flat, groups, tokens, places = [], [], [], []
    for g, group in enumerate(rewards):
        scored = [i for i, r in enumerate(group) if r is not None]
        if len(scored) == 1 and len(group) > 1:
            scored = []
        flat += [group[i] for i in scored]
        groups += [g] * len(scored)
        tokens += [lengths[g][i] for i in scored]
        places += [(g, i) for i in scored]
    want = [[None] * len(group) for group in rewards]
    for (g, i), value in zip(places, oracle.episode_advantages(flat, groups, tokens, mode), strict=True):
        want[g][i] = pytest.approx(value, rel=1e-5, abs=1e-6)
    assert got == want


def test_is_uniform():
    assert is_uniform([1.0, 1.0, None, 1.0])
    assert is_uniform([0.25])
    assert is_uniform([None])
    assert not is_uniform([0.0, None, 1.0])


@pytest.mark.parametrize("reward", [1.25, -0.5])
def test_maxrl_names_the_reward_outside_its_range(reward):
    with pytest.raises(RetrainError, match=rf"reward {reward} of completion 1 in group 2 .*\[0, 1\].*maxrl"):
        group_advantages([[0.0], [None], [1.0, reward]], [[1], [1], [1, 1]], mode="maxrl")
    assert group_advantages([[1.0, reward]], [[1, 1]], mode="dr_grpo")[0][0] == pytest.approx((1.0 - reward) / 2)


@pytest.mark.parametrize("mode", ["grpo", "math.sqrt"])
def test_a_reward_that_is_not_finite_is_an_error(mode):
    with pytest.raises(RetrainError, match="reward nan of completion 0 in group 0 is not finite"):
        group_advantages([[math.nan, 0.0]], [[1, 1]], mode=mode)


def test_advantage_plugin_sees_each_group_without_its_errors(plugin):
    name = plugin("def best(rewards):\n    return (rewards == rewards.max()).float() * len(rewards)\n")
    got = group_advantages([[0.0, None, 2.0], [5.0], [None, 1.0], [3.0, 3.0]], [[1] * 3] * 4, mode=f"{name}.best")
    assert got == [[0.0, None, 2.0], [0.0], [None, None], [2.0, 2.0]]


# ---- token credit -------------------------------------------------------------------------------------------------

CREDIT = {"gtpo_beta": 0.3, "hicra_alpha": 0.2, "sepa_lambda": 0.5}


def credit_inputs():
    advantages = torch.tensor([1.5, -0.5])
    spread = torch.tensor([0.1, 2.0, 0.4, 1.0, 0.7])
    planning = torch.tensor([False, True, False, True, False])
    return advantages, spread, planning, torch.tensor([0, 3, 5], dtype=torch.int32)


@pytest.mark.parametrize("mode", transform.MODES)
def test_token_credit_matches_the_oracle(mode):
    advantages, spread, planning, cu = credit_inputs()
    got = token_credit(advantages, spread, planning, cu, transform_mode=mode, **CREDIT)
    want = [
        value
        for a, start, stop in ((1.5, 0, 3), (-0.5, 3, 5))
        for value in oracle.token_advantages(
            a, spread[start:stop].tolist(), planning[start:stop].tolist(), mode, beta=0.3, alpha=0.2, sepa_lambda=0.5
        )
    ]
    torch.testing.assert_close(got, torch.tensor(want))


def test_transform_plugin(plugin):
    name = plugin(
        "def credit(advantages, uncertainty, planning, cu_seqlens):\n"
        "    lengths = cu_seqlens[1:] - cu_seqlens[:-1]\n"
        "    return advantages.repeat_interleave(lengths).double() + planning * uncertainty\n"
    )
    advantages, spread, planning, cu = credit_inputs()
    got = token_credit(advantages, spread.requires_grad_(), planning, cu, transform_mode=f"{name}.credit", **CREDIT)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, torch.tensor([1.5, 3.5, 1.5, 0.5, -0.5]))


# ---- plug-ins and names that are wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "function", "error", "message"),
    [
        ("", "missing", ConfigError, "has no 'missing'"),
        ("fn = 3", "fn", ConfigError, "'fn' is int, not a function"),
        ("def fn(): pass", "fn", ConfigError, r"called with \(rewards\[G\]\), but its signature is \(\): too many"),
        ("def fn(a, b): pass", "fn", ConfigError, r"its signature is \(a, b\): missing a required argument: 'b'"),
        ("import no_such_thing", "fn", ConfigError, "cannot import 'users_plugin': ModuleNotFoundError.*no_such_thing"),
        ("1 / 0", "fn", ConfigError, "cannot import 'users_plugin': ZeroDivisionError: division by zero"),
        ("def fn(r: broken", "fn", ConfigError, "cannot import 'users_plugin': SyntaxError"),
        ("def fn(r): raise KeyError('x')", "fn", RetrainError, "raised KeyError: 'x'"),
        ("def fn(r): return r.tolist()", "fn", RetrainError, r"must return a torch.Tensor .*\[2\], returned list"),
        ("def fn(r): return r[:1]", "fn", RetrainError, r"must return a tensor of shape \[2\], returned \[1\]"),
        ("def fn(r): return r / 0", "fn", RetrainError, "returned values that are not finite: (nan|inf)"),
    ],
)
def test_broken_plugins_are_named(plugin, source, function, error, message):
    name = plugin(source)
    with pytest.raises(error, match=message) as raised:
        group_advantages([[0.0, 1.0]], [[1, 1]], mode=f"{name}.{function}")
    assert type(raised.value) is error
    assert str(raised.value).startswith(f'algorithm.advantage_mode = "users_plugin.{function}": ')


def test_transform_plugin_with_a_wrong_shape_or_signature(plugin):
    name = plugin("def short(a, u, p, c): return u[1:]\ndef few(a, u): return u\n")
    for function, error, message in (
        ("short", RetrainError, r"must return a tensor of shape \[5\], returned \[4\]"),
        ("few", ConfigError, r"called with \(advantages\[B\], .*but its signature is \(a, u\)"),
    ):
        with pytest.raises(error, match=f'algorithm.transform_mode = "users_plugin.{function}": .*{message}'):
            token_credit(*credit_inputs(), transform_mode=f"{name}.{function}", **CREDIT)


@pytest.mark.parametrize("path", ["a..b", ".fn", "mod.", "pkg.my-mod.fn"])
def test_malformed_paths(path):
    with pytest.raises(ConfigError, match=r'not a dotted path; write "package.module.function"'):
        group_advantages([[0.0, 1.0]], [[1, 1]], mode=path)


def test_plugins_are_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "plugin_of_the_cwd.py").write_text("def fn(r): return r * 2\n")
    assert group_advantages([[0.0, 1.0]], [[1, 1]], mode="plugin_of_the_cwd.fn") == [[0.0, 2.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages([], [], mode="gpro"), 'advantage_mode = "gpro".*did you mean "grpo".*dotted path'),
        (lambda: group_advantages([], [], mode="precomputed"), 'advantage_mode = "precomputed" is not known'),
        (
            lambda: token_credit(*credit_inputs(), transform_mode="gtpo-sepa", **CREDIT),
            'transform_mode = "gtpo-sepa".*did you mean "gtpo_sepa"',
        ),
        (lambda: resolve("entropie", has_entropy=True), 'uncertainty = "entropie".*did you mean "entropy"'),
        (lambda: SepaController(**SECTION | {"schedule": "liner"}), 'schedule = "liner".*did you mean "linear"'),
    ],
)
def test_unknown_names_get_the_nearest_spelling(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# ---- uncertainty --------------------------------------------------------------------------------------------------


def test_uncertainty_kinds():
    logprob = torch.tensor([-0.5, -100.0, 1e-7], requires_grad=True)
    entropy = torch.tensor([0.3, 60.0, -1e-7])
    assert token_uncertainty("entropy", logprob, entropy).tolist() == pytest.approx([0.3, 50.0, 0.0])
    assert token_uncertainty("surprisal", logprob).tolist() == pytest.approx([0.5, 50.0, 0.0])
    p = math.exp(-0.5)
    assert token_uncertainty("variance", logprob, entropy).tolist() == pytest.approx([p * (1 - p), 0.0, 0.0])
    assert torch.equal(token_uncertainty("auto", logprob, entropy), token_uncertainty("entropy", logprob, entropy))
    assert not token_uncertainty("surprisal", logprob).requires_grad


def test_auto_uncertainty_is_settled_by_what_there_is():
    assert resolve("auto", has_entropy=True) == "entropy"
    assert resolve("auto", has_entropy=False) == "surprisal"
    assert [resolve(kind, has_entropy=True) for kind in uncertainty.KINDS[1:]] == ["entropy", "surprisal", "variance"]
    with pytest.raises(ConfigError, match=r'uncertainty = "entropy": this backend does not give .* use "surprisal"'):
        resolve("entropy", has_entropy=False)


# ---- SEPA ---------------------------------------------------------------------------------------------------------


def controller(**changes):
    return SepaController(**SECTION | changes)


def test_linear_ramp():
    sepa = controller()
    assert [sepa.value(step, 0.0) for step in (0, 5, 6, 10, 15, 99)] == pytest.approx([0, 0, 0.1, 0.5, 1, 1])
    assert controller(steps=0).value(99, 1.0) == 0.0


def test_gate_is_sticky_and_opens_for_the_step_that_reaches_it():
    sepa = controller(correct_rate_gate=0.5, delay_steps=0)
    assert not sepa.gate_open
    assert [sepa.value(step, rate) for step, rate in ((1, 0.4), (2, None), (3, 0.5), (4, 0.0), (5, None))] == (
        pytest.approx([0, 0, 0.3, 0.4, 0.5])
    )
    assert sepa.gate_open
    assert controller(correct_rate_gate=0.0).gate_open


def test_auto_schedule_follows_the_decay_of_the_variance():
    sepa = controller(schedule="auto", steps=1000, delay_steps=0, ema_decay=0.9, warmup=3)
    ema = None
    for update in range(1, 31):
        variance = 2.0 if update <= 3 else 0.0
        ema = variance if ema is None else 0.9 * ema + 0.1 * variance
        sepa.observe(variance)
        linear = update / 1000
        automatic = 0.0 if update < 3 else 1 - min((ema / 2.0) / 0.2, 1)
        assert sepa.value(update, 1.0) == pytest.approx(max(automatic, linear))
    assert sepa.value(30, 1.0) > 0.5  # the automatic part, far above the ramp
    assert sepa.value(900, 1.0) == pytest.approx(0.9)  # and the ramp where it is the larger


def test_auto_schedule_without_variance_is_the_ramp():
    sepa = controller(schedule="auto", delay_steps=0, warmup=1)
    sepa.observe(None)
    assert sepa.value(1, 1.0) == pytest.approx(0.1)
    sepa.observe(0.0)
    assert sepa.value(1, 1.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="exec_variance must be a finite number >= 0, got nan"):
        sepa.observe(math.nan)


@pytest.mark.parametrize("stop", [0, 1, 49, 50, 51, 80])
def test_a_restored_controller_goes_on_the_same(stop):
    section = SECTION | {"schedule": "auto", "correct_rate_gate": 0.3, "steps": 200}
    # The gate opens at step 30 and only there.
    steps = [(step, 0.3 if step == 30 else 0.0, 1 / (1 + step)) for step in range(100)]

    def play(sepa, steps):
        values = []
        for step, rate, variance in steps:
            values.append(sepa.value(step, rate))
            sepa.observe(variance)
        return values

    whole = SepaController(**section)
    want = play(whole, steps)
    first = SepaController(**section)
    head = play(first, steps[:stop])
    second = SepaController.from_state(json.loads(json.dumps(first.state())), **section)
    assert head + play(second, steps[stop:]) == want
    assert second.state() == whole.state()
    assert max(want) > 0.3


def test_a_foreign_state_is_refused():
    with pytest.raises(RetrainError, match=r"SEPA state of the checkpoint has keys \['gate_open'\], expected"):
        SepaController.from_state({"gate_open": True}, **SECTION)


# ---- overlong penalty ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (20481, -1), (99999, -1)]
)
def test_overlong_check_values(length, penalty):
    assert overlong_penalty(length, 20480, 4096) == penalty


def test_overlong_without_buffer_is_a_cliff():
    assert [overlong_penalty(n, 100, 0) for n in (0, 99, 100, 101)] == [0, 0, 0, -1]
    with pytest.raises(ConfigError, match=r"overlong_buffer = 101 must lie in \[0, 100\]"):
        overlong_penalty(5, 100, 101)


def test_schedule_and_penalty_need_no_torch():
    imports = "retrain.algorithm.sepa, retrain.algorithm.overlong, retrain.plugin"
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
