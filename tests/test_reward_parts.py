"""Several rewards at once, `[[reward.parts]]`: the sum, its errors, its configuration and its records."""

from __future__ import annotations

from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.config import build, changed, dump_toml, load_config, without_effect
from retrain.reward.parts import PartsScorer
from retrain.training.collect import RewardsFailed, check_error_rate
from retrain.types import Completion, ConfigError, Example, Group, Score
from runs import lines, retrain, write_config


class Fixed:
    """Gives the scores it was made with."""

    def __init__(self, values, figures=None):
        self.values, self.facts, self.closed, self.asked = values, figures or {}, False, None

    def score(self, responses, references, prompts=None):
        self.asked = (list(responses), list(references), prompts)
        return [Score(None, "no idea") if value is None else Score(value) for value in self.values]

    def figures(self):
        return self.facts

    def close(self):
        self.closed = True


value = st.none() | st.floats(-10, 10)


@given(st.lists(st.tuples(value, value, value), max_size=5), st.tuples(*[st.floats(-3, 3)] * 3))
def test_the_sum_is_there_where_every_part_is(rows, weights):
    columns = list(zip(*rows, strict=True)) or [()] * 3
    scorer = PartsScorer([(name, w, Fixed(c)) for name, w, c in zip("abc", weights, columns, strict=True)])
    got = scorer.score(["x"] * len(rows), ["r"] * len(rows))
    for row, verdict in zip(rows, got, strict=True):
        assert verdict.parts == tuple(zip("abc", row, strict=True))
        if None in row:
            assert verdict.value is None and f"{'abc'[row.index(None)]}: no idea" in verdict.error
        else:
            expected = row[0] * weights[0] + row[1] * weights[1] + row[2] * weights[2]
            assert verdict.value == pytest.approx(expected, abs=1e-9) and verdict.error is None


def test_every_part_gets_the_same_and_is_closed():
    parts = [Fixed([1.0]), Fixed([0.5])]
    with closing(PartsScorer([("a", 1.0, parts[0]), ("b", 2.0, parts[1])])) as scorer:
        assert scorer.score(["x"], ["r"], ["p"]) == [Score(2.0, None, (("a", 1.0), ("b", 0.5)))]
    assert [(part.closed, part.asked) for part in parts] == [(True, (["x"], ["r"], ["p"]))] * 2


def test_figures_of_two_judges():
    scorer = PartsScorer([("a", 1.0, Fixed([], {"n": 1})), ("b", 1.0, Fixed([], {"n": 2, "m": None}))])
    assert scorer.figures() == {"n": 1, "n_b": 2, "m": None}


# --- configuration ---------------------------------------------------------------------------------------------------

TOML = """
[algorithm]
advantage_mode = "grpo"
[reward]
max_error_rate = 0.25
[[reward.parts]]
type = "math"
weight = 0.75
timeout_s = 5.0
[[reward.parts]]
name = "short"
type = "custom"
custom_module = "lengths"
weight = -0.5
"""


def test_parts_load_and_come_back(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    config = load_config(path)
    first, second = config.reward.parts
    assert (first.type, first.label, first.weight, first.timeout_s) == ("math", "math", 0.75, 5.0)
    assert (second.label, second.custom_module, second.custom_function) == ("short", "lengths", "score")
    again = tmp_path / "again.toml"
    again.write_text(dump_toml(config))
    assert load_config(again) == config
    assert "reward.parts" in changed(config)


def test_parts_are_explained(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    done = retrain("explain", path)
    assert done.returncode == 0
    assert '* parts = [{"type": "math"' in done.stdout


def refusal(*parts, mode="grpo", **keys):
    with pytest.raises(ConfigError) as refused:
        build({"algorithm": {"advantage_mode": mode}, "reward": {"parts": list(parts), **keys}})
    return str(refused.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "maths"}, 'reward.parts[1].type = "maths": must be one of match, math, judge, custom; did you mean'),
        ({"tpye": "math"}, 'reward.parts[1].tpye: unknown key; did you mean "type"?'),
        ({"weight": "1"}, 'reward.parts[1].weight = "1": must be a number; write 1 without quotes'),
        ({"weight": float("nan")}, "reward.parts[1].weight = nan: must be a finite number"),
        ({"timeout_s": 0}, "reward.parts[1].timeout_s = 0: out of range, must be > 0"),
        ({"type": "judge"}, 'reward.parts[1].type = "judge": needs reward.parts[1].judge_model'),
        ({"type": "custom"}, 'reward.parts[1].type = "custom": needs reward.parts[1].custom_module'),
        ({"name": "a b"}, 'reward.parts[1].name = "a b": ends the name of a metric'),
        ({"name": "errors"}, 'reward.parts[1].name = "errors": reward_errors is a figure of its own'),
        ({"parts": []}, "reward.parts[1].parts: unknown key"),
        ({"max_error_rate": 0.1}, "reward.parts[1].max_error_rate: unknown key"),
        ({}, "reward.parts: two have the same name; give each a `name` of its own"),
    ],
)
def test_wrong_parts(part, message):
    assert refusal({"type": "match"}, part).startswith(message)


def test_parts_that_are_no_tables():
    assert refusal("math") == 'reward.parts[0] = "math": must be a table'
    with pytest.raises(ConfigError, match=r"^reward\.parts = \"math\": must be a list"):
        build({"reward": {"parts": "math"}})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/v1", 'reward.judge_url = "127.0.0.1:8000/v1": must begin with http'),
        ("http://me:secret@x/v1", "reward.judge_url: must not hold a password; set OPENAI_API_KEY"),
    ],
)
def test_wrong_judge_url(url, message):
    said = refusal(type="judge", judge_model="m", judge_url=url)
    assert said.startswith(message) and "secret" not in said


def test_weights_that_maxrl_cannot_take():
    half = {"type": "math", "weight": 0.5}
    for parts in ([{"weight": 0.6}, half], [{"weight": -0.1}, half]):
        assert "maxrl needs rewards within" in refusal(*parts, mode="maxrl")
        build({"algorithm": {"advantage_mode": "grpo"}, "reward": {"parts": parts}})
    build({"reward": {"parts": [{"weight": 0.5}, half]}})
    build({"reward": {"parts": [{"type": "custom", "custom_module": "m", "weight": 3.0}]}})  # known only in the run


def test_keys_without_effect_are_said():
    reward = {"type": "math", "parts": [{"judge_model": "m"}, {"type": "math", "weight": 0.0, "timeout_s": 3.0}]}
    assert [line for line in without_effect(build({"reward": reward})) if line.startswith("reward.")] == [
        'reward.type = "math": no effect with reward.parts, which have such keys of their own',
        'reward.parts[0].judge_model = "m": no effect with type = "match"',
    ]
    lone = without_effect(build({"reward": {"judge_retries": 3, "timeout_s": 3.0, "max_error_rate": 1.0}}))
    assert [line for line in lone if line.startswith("reward.")] == [
        'reward.judge_retries = 3: no effect with reward.type = "match"',
        'reward.timeout_s = 3.0: no effect with reward.type = "match"',
    ]


# --- the share of errors ---------------------------------------------------------------------------------------------


def groups(*errors_PG):
    empty = Completion((), (), "stop", 0, "")
    return [
        Group(0, Example("p", "r"), (), tuple(empty for _ in e), tuple(None if x else 1.0 for x in e), tuple(e))
        for e in errors_PG
    ]


def test_the_rate_is_exceeded_only_above_it():
    half = groups((None, "a"), ("b", None))
    check_error_rate(half, 0.5)
    check_error_rate(groups(("a", "a")), 1.0)
    check_error_rate([], 0.0)
    check_error_rate(groups((None, None)), 0.0)
    with pytest.raises(RewardsFailed, match=r"2 of 4 rewards .* reward.max_error_rate = 0.49:\n  1 x a\n  1 x b$"):
        check_error_rate(half, 0.49)


def test_the_commonest_reasons_are_told():
    with pytest.raises(RewardsFailed) as failed:
        check_error_rate(groups(tuple("abbcccdddd")), 0.5)
    assert str(failed.value).split("\n")[1:] == ["  4 x d", "  3 x c", "  2 x b"]


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_with_parts(tmp_path):
    code = "def score(response, reference):\n    return len(response)"
    (tmp_path / "lengths.py").write_text(code)
    config = write_config(
        tmp_path,
        tmp_path / "run",
        '[[reward.parts]]\nweight = 2.0\n[[reward.parts]]\nname = "length"\ntype = "custom"\n'
        'custom_module = "lengths"\nweight = -0.125\n[[reward.parts]]\ntype = "math"\nweight = 0.0\n',
    )
    done = retrain(config, "--max-steps", 2, "--max-tokens", 48, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    generations = lines(tmp_path / "run" / "generations.jsonl")
    for row in generations:
        parts = row["reward_parts"]
        assert row["reward"] == pytest.approx(2 * parts["match"] - 0.125 * parts["length"])
        assert parts["length"] == len(row["completion"]) and parts["math"] >= parts["match"]
    for step in lines(tmp_path / "run" / "metrics.jsonl"):
        own = [row["reward_parts"] for row in generations if row["step"] == step["step"]]
        for name in ("match", "length", "math"):
            assert step[f"reward_{name}"] == pytest.approx(sum(parts[name] for parts in own) / len(own))
