"""Warnings of a run that does not learn: each provoked, by a run where that is cheap, and none on a run that learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain import ConfigError, RetrainError, load_config
from retrain.config import Config
from retrain.config.build import build
from retrain.training import health
from retrain.training.checkpoint import TrainerState
from retrain.training.run import _fitting, train
from runs import lines, retrain, unmeasured, write_config

# ---- streams of metrics -------------------------------------------------------------------------------------------

HEALTHY = {
    "batch_size": 4, "group_size": 8, "completion_tokens": 500, "num_datums": 32, "loss": -0.1, "grad_norm": 0.2,
    "entropy_mean": 0.5, "logprob_gap_mean": 1e-3, "max_token_hit_rate": 0.1, "mean_reward": 0.3, "correct_rate": 0.3,
    "running_correct_rate": 0.3, "reward_errors": 0, "groups_all_correct": 0, "groups_all_wrong": 1,
    "planning_fraction": 0.05, "sepa_gate_open": True, "skipped": None,
}  # fmt: skip
UNTRAINED = dict.fromkeys(("loss", "grad_norm", "entropy_mean", "logprob_gap_mean", "planning_fraction"))
ALIKE = {**UNTRAINED, "num_datums": 0, "groups_all_wrong": 4, "correct_rate": 0.0, "running_correct_rate": 0.0}
SKIPPED = {**UNTRAINED, "skipped": "gradient"}


def config(**overrides) -> Config:
    defaults = {"training.max_steps": 100, "algorithm.transform_mode": "gtpo_sepa_hicra"}
    return build({}, overrides=defaults | {key.replace("__", "."): value for key, value in overrides.items()})


def reports(stream, settings_=None, memory=None, first=1):
    """A report for each row, which is what differs from HEALTHY; memory through JSON, as a checkpoint keeps it."""
    memory, found = memory or {}, []
    for step, row in enumerate(stream, start=first):
        report = health.examine(settings_ or config(), {**HEALTHY, "step": step, **row}, memory)
        memory = json.loads(json.dumps(report.memory, allow_nan=False))
        found.append(report)
    return found


def holding(stream, settings_=None):
    """Names of what holds at each step."""
    return [[finding.name for finding in report.holding] for report in reports(stream, settings_)]


def said(stream, settings_=None):
    """{step: line} of what is said."""
    return {
        step: finding.line for step, report in enumerate(reports(stream, settings_), start=1) for finding in report.said
    }


def test_a_healthy_stream_is_silent():
    assert holding([{}] * 40) == [[]] * 40


def test_a_backend_that_reports_less_is_no_finding():
    figures = ("grad_norm", "entropy_mean", "logprob_gap_mean", "planning_fraction")
    assert holding([dict.fromkeys(figures)] * 10) == [[]] * 10


def test_truncated_within_the_first_steps():
    assert holding([{"max_token_hit_rate": 0.6}] * 2) == [["truncated"]] * 2
    (line,) = said([{"max_token_hit_rate": 0.97}] * 4, config(training__max_tokens=77)).values()
    assert line.startswith("97% of the completions")
    assert "training.max_tokens = 77: raise it" in line


def test_half_of_the_completions_cut_is_not_yet_too_many():
    assert holding([{"max_token_hit_rate": 0.5}] * 10) == [[]] * 10


def test_few_completions_decide_nothing_before_the_window_is_full():
    few = {"batch_size": 1, "group_size": 2, "max_token_hit_rate": 1.0}
    assert holding([few] * 6) == [[]] * 4 + [["truncated"]] * 2


def test_truncation_that_begins_later_is_seen_over_the_window():
    stream = [{}] * 20 + [{"max_token_hit_rate": 1.0}] * 5
    assert [i for i, names in enumerate(holding(stream)) if names] == [22, 23, 24]


def test_uniform_groups_after_five_in_a_row():
    assert holding([ALIKE] * 4 + [{}] + [ALIKE] * 6) == [[]] * 9 + [["uniform_groups"]] * 2
    (line,) = said([ALIKE] * 7).values()
    assert "(0 groups all right, 20 all wrong)" in line
    assert "easier examples" in line
    right = {**ALIKE, "groups_all_wrong": 0, "groups_all_correct": 4, "correct_rate": 1.0}
    (line,) = said([right] * 5).values()
    assert "(20 groups all right, 0 all wrong)" in line
    assert "harder examples" in line


def test_uniform_groups_that_are_kept_have_a_gradient_of_zero():
    kept = {**HEALTHY, "grad_norm": 0.0, "groups_all_wrong": 4}
    assert holding([kept] * 5)[-1] == ["uniform_groups"]


def test_a_gradient_of_exactly_zero():
    stream = [{"grad_norm": 0.0}] * 6
    assert holding(stream) == [[]] * 4 + [["no_gradient"]] * 2
    masks = config(loss__mismatch_correction="mask", loss__old_logprobs="recompute")
    assert '"mask" drops every token' in said(stream, masks)[5]


def test_no_reward_could_be_computed():
    failed = {**UNTRAINED, "num_datums": 0, "mean_reward": None, "correct_rate": None, "reward_errors": 32}
    assert holding([failed]) == [["reward_errors"]]
    assert "not one of the 32 rewards of step 1" in said([failed])[1]
    assert holding([failed] * 6)[-1] == ["reward_errors"], "and not that all groups are alike"


def test_every_token_is_masked():
    masked = {**UNTRAINED, "num_datums": 0, "completion_tokens": 0}
    assert holding([masked] * 6) == [["masked"]] * 6


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_planning_fraction_with_a_transform_that_needs_it(fraction):
    stream = [{"planning_fraction": fraction}] * 5
    for mode in ("gtpo_sepa", "gtpo_hicra", "gtpo_sepa_hicra"):
        assert holding(stream, config(algorithm__transform_mode=mode))[-1] == ["planning"], mode
    for mode in ("none", "gtpo", "own.transform"):
        assert holding(stream, config(algorithm__transform_mode=mode))[-1] == [], mode
    off = config(algorithm__transform_mode="gtpo_hicra", hicra__alpha=0.0)
    assert holding(stream, off)[-1] == []
    assert holding([*stream[:4], {"planning_fraction": 0.5}])[-1] == []
    assert f"(planning_fraction {fraction:g})" in said(stream)[5]


def test_the_sepa_gate_at_half_time():
    shut = {"sepa_gate_open": False}
    stream = [{**shut, "correct_rate": 0.07 if i == 3 else 0.02} for i in range(60)]
    (line,) = said(stream).values()
    assert min(i for i, names in enumerate(holding(stream), 1) if names) == 50
    assert "shut at step 50 of 100: the best batch was 7% right, sepa.correct_rate_gate = 0.1" in line
    assert not any(holding(stream, config(algorithm__transform_mode="gtpo_hicra")))
    assert not any(holding([shut] * 4, config(training__max_steps=4))), "too short a run to say"


def test_the_gap_rises():
    stream = [{"logprob_gap_mean": gap} for gap in [0.015] * 10 + [0.05] * 5]
    assert holding(stream) == [[]] * 12 + [["logprob_gap"]] * 3
    line = said(stream)[13]
    assert "0.036 nats a token over the last 5 steps (0.015 in the first)" in line
    assert "training.temperature" in line
    assert "lora.dropout = 0.1" in said(stream, config(lora__dropout=0.1))[13]
    assert "training.max_staleness (now 2)" in said(stream, config(training__max_staleness=2))[13]
    assert not any(holding([{"logprob_gap_mean": gap} for gap in [1e-6] * 10 + [0.01] * 10])), "small, for all its rise"


def test_a_gap_that_is_large_from_the_beginning():
    assert holding([{"logprob_gap_mean": 0.3}]) == [["logprob_gap"]]


def test_entropy_collapse_and_not_success():
    falling = [{"entropy_mean": 0.5 * 0.8**i} for i in range(20)]
    names = holding(falling)
    assert names[-1] == ["entropy_collapse"]
    # The first five average 0.336; the mean of five is below a tenth of it where 0.8^i has fallen by ten.
    assert min(i for i, found in enumerate(names) if found) == math.ceil(math.log(0.1) / math.log(0.8)) + 4
    learned = [{**row, "running_correct_rate": 0.95} for row in falling]
    assert not any(holding(learned))


def test_skipped_steps_and_three_in_a_row():
    found = reports([SKIPPED, {}, SKIPPED, SKIPPED, ALIKE, SKIPPED])
    assert [[(f.name, f.fatal) for f in report.holding] for report in found] == [
        [("not_finite", False)],
        [],
        [("not_finite", False)],
        [("not_finite", False)],
        [],  # nothing to train on: neither a skipped step nor a good one
        [("not_finite", True)],
    ]
    assert "step 6 was skipped, 3 in a row: the gradient" in found[-1].holding[0].line
    sampler = reports([{**UNTRAINED, "skipped": "sampler's log-probabilities"}])[0].holding[0].line
    assert "inference engine" in sampler


def test_said_once_and_again_only_after_ten_quiet_steps():
    cut, fine = {"max_token_hit_rate": 1.0}, {"max_token_hit_rate": 0.0}
    # Over the window: holds in steps 1 to 7, then from 18 on.
    stream = [cut] * 5 + [fine] * 10 + [cut] * 10
    held = [step for step, names in enumerate(holding(stream), 1) if names]
    assert held == [*range(1, 8), *range(18, 26)]
    assert list(said(stream)) == [1, 18]
    nearer = [cut] * 5 + [fine] * 8 + [cut] * 10
    assert list(said(nearer)) == [1]


ODD = st.sampled_from(
    [{}, ALIKE, SKIPPED, {"max_token_hit_rate": 1.0}, {"planning_fraction": 0.0}, {"entropy_mean": 0.01},
     {"logprob_gap_mean": 0.2}, {"grad_norm": 0.0}, {"sepa_gate_open": False}, {"running_correct_rate": None}]
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(stream=st.lists(ODD, min_size=2, max_size=40), data=st.data())
def test_a_resumed_run_says_what_an_uninterrupted_one_does(stream, data):
    cut = data.draw(st.integers(1, len(stream) - 1))
    whole, begun = reports(stream), reports(stream[:cut])
    rest = reports(stream[cut:], memory=json.loads(json.dumps(begun[-1].memory)), first=cut + 1)
    assert [*begun, *rest] == whole


def test_at_load():
    assert health.at_load(config(sepa__steps=5)) == []
    (line,) = health.at_load(config(training__max_staleness=1))
    assert line.startswith("training.max_staleness = 1: sampling has no device or server of its own")
    assert health.at_load(config(training__max_staleness=1, backend__devices="cpu,cpu")) == []
    assert [line.partition(":")[0] for line in health.at_load(config(training__group_size=1, training__lr=0.0))] == [
        "training.group_size = 1",
        "training.lr = 0",
    ]
    assert any("no effect" in line for line in health.at_load(config(algorithm__transform_mode="none", gtpo__beta=0.3)))


# ---- runs ---------------------------------------------------------------------------------------------------------


class Listener:
    def __init__(self):
        self.lines, self.rows = [], []

    def say(self, line):
        self.lines.append(line)

    def on_step(self, metrics, generations):
        self.rows.append(metrics)

    @property
    def warnings(self):
        return [line.removeprefix("warning: ") for line in self.lines if line.startswith("warning: ")]


CUT = {"training.max_tokens": 4, "training.max_steps": 6, "sepa.correct_rate_gate": 0.1, "training.save_every": 3}


def run(tmp_path: Path, overrides, name="run") -> Listener:
    listener = Listener()
    overrides = {"logging.log_dir": str(tmp_path / name), **overrides}
    train(load_config(write_config(tmp_path, tmp_path / name), overrides=overrides), observer=listener)
    return listener


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a module of the test's own that plug-ins are taken from; its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """Four tokens are too few for any answer: no reward, no gradient, no gate."""
    folder = tmp_path_factory.mktemp("cut")
    return folder, run(folder, CUT)


def test_a_run_with_too_few_tokens_says_so(cut_run):
    _, listener = cut_run
    assert [line.split(" ", 1)[1].split(":")[0] for line in listener.warnings] == [
        "of the completions of the last 2 steps were cut at training.max_tokens = 4",
        "group of the last 5 steps had two different rewards (0 groups all right, 10 all wrong), so there is nothing "
        "to learn from",
        "SEPA gate is still shut at step 5 of 6",
    ]
    assert [row["warnings"] for row in listener.rows] == [
        [],
        *[["truncated"]] * 3,
        *[["truncated", "uniform_groups", "sepa_gate"]] * 2,
    ]


def test_resumed_it_says_the_same(cut_run, tmp_path):
    folder, whole = cut_run
    forked = run(tmp_path, {**CUT, "resume.from": str(folder / "run" / "checkpoints" / "step_000003")}, "fork")
    assert forked.warnings == whole.warnings[1:]
    assert list(map(unmeasured, forked.rows)) == list(map(unmeasured, whole.rows[3:]))


def test_strict_ends_the_run_with_its_state_saved(tmp_path):
    flags = [f"--{key.replace('.', '-').replace('_', '-').removeprefix('training-')}" for key in CUT]
    arguments = [part for pair in zip(flags, CUT.values(), strict=True) for part in pair]
    done = retrain(write_config(tmp_path, tmp_path / "run"), *arguments, "--strict")
    assert done.returncode == 1, done.stderr
    assert "100% of the completions of the last 2 steps were cut" in done.stderr
    assert "(training.strict = true)\nCheckpoint of step 2 written. Go on with: retrain" in done.stderr
    assert [row["warnings"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [[], ["truncated"]]
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["step"] == 2
    with pytest.raises(health.NotLearning, match="of the last 3 steps"):
        run(tmp_path, {**CUT, "training.strict": True, "resume.from": str(tmp_path / "run")})
    assert [row["warnings"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [[], ["truncated"], ["truncated"]]
    on = run(tmp_path, {**CUT, "training.max_steps": 4, "training.strict": False, "resume.from": str(tmp_path / "run")})
    assert [row["step"] for row in on.rows] == [4]


def test_strict_refuses_a_key_without_effect_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"hicra\.alpha = 0\.5: no effect .*\(training\.strict = true\)"):
        run(tmp_path, {"training.strict": True, "algorithm.transform_mode": "gtpo_sepa", "hicra.alpha": 0.5})
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_always_one_and_grams_that_never_occur(tmp_path, plugin):
    name = plugin("always_one", "def score(response, reference):\n    return 1.0\n")
    overrides = {"reward.type": "custom", "reward.custom_module": name, "training.max_steps": 5}
    listener = run(tmp_path, overrides)
    assert "(10 groups all right, 0 all wrong)" in listener.warnings[-1]
    assert listener.rows[-1]["warnings"][-1] == "uniform_groups"
    kept = {"algorithm.skip_uniform_groups": False, "logging.strategic_grams": "xylophone zebra", **overrides}
    listener = run(tmp_path, kept, "kept")
    assert listener.rows[-1]["warnings"][-2:] == ["uniform_groups", "planning"]


# A transform that overflows wherever the batch says so: 0 never, else where some advantage is above it.
EXPLODES = """
import torch
def spread(advantages, uncertainty, planning, cu_seqlens):
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1])
    credit = torch.repeat_interleave(advantages, lengths)
    bad = torch.repeat_interleave(advantages > {above}, lengths)
    return torch.where(bad, torch.full_like(credit, 3e38), credit)
"""
LEARNING = {
    "training.max_tokens": 48, "training.group_size": 8, "training.max_steps": 5, "training.save_every": 1,
    "training.keep_checkpoints": 0, "loss.aggregation": "constant", "training.seed": 5,
}  # fmt: skip


def test_steps_that_are_not_finite_are_skipped_counted_kept_and_resumed_exactly(tmp_path, plugin):
    """With grpo a lone success among eight has an advantage above 2; such a group overflows."""
    name = plugin("explodes", EXPLODES.format(above=1.5))
    overrides = {**LEARNING, "algorithm.transform_mode": f"{name}.spread"}
    whole = run(tmp_path, overrides)
    skipped = [row["step"] for row in whole.rows if row["skipped"]]
    assert skipped
    assert len(skipped) < len(whole.rows)
    assert whole.rows[-1]["skipped_steps"] == len(skipped)
    for row in whole.rows:
        assert (row["warnings"] == ["not_finite"]) is (row["skipped"] is not None)
        assert (row["loss"] is None) is (row["skipped"] is not None or row["num_datums"] == 0)
    saved = lines(tmp_path / "run" / "nonfinite.jsonl")
    assert sorted({row["step"] for row in saved}) == skipped
    assert all(row["advantage"] > 1.5 and row["not_finite"] in ("loss", "gradient") for row in saved)
    sampled = lines(tmp_path / "run" / "generations.jsonl")
    texts = {(row["step"], row["prompt_index"]): row["prompt"] for row in sampled}
    for row in saved:
        assert len(row["tokens"]) == len(row["sampler_logprobs"]) == len(row["planning"])
        assert texts[row["step"], row["prompt_index"]] == row["prompt"]
    at = skipped[0]
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{at:06d}"
    forked = run(tmp_path, {**overrides, "resume.from": str(checkpoint)}, "fork")
    assert list(map(unmeasured, forked.rows)) == list(map(unmeasured, whole.rows[at:]))
    for file in ("nonfinite.jsonl", "generations.jsonl", "final/adapter_model.safetensors"):
        assert (tmp_path / "fork" / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file


def test_three_skipped_steps_in_a_row_end_the_run(tmp_path, plugin):
    name = plugin("always_explodes", EXPLODES.format(above=-9))
    overrides = {**LEARNING, "algorithm.transform_mode": f"{name}.spread"}
    with pytest.raises(health.NotLearning, match=r"3 in a row.*\nCheckpoint of step \d written\. Go on with"):
        run(tmp_path, overrides)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] is not None for row in rows if row["num_datums"]] == [True] * 3
    assert rows[-1]["policy_version"] == 0
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["step"] == len(rows)
    assert json.loads((tmp_path / "run" / "metadata.json").read_text())["sessions"][-1]["status"] == "failed"


def test_a_reward_out_of_range_ends_the_run_with_the_last_step_saved(tmp_path, plugin):
    """A failing run removes no checkpoint either, however few are to be kept."""
    marker = tmp_path / "broken"
    name = plugin(
        "grows",
        f"from pathlib import Path\ndef score(response, reference):\n"
        f"    return 2.0 if Path({str(marker)!r}).exists() else float(len(response) % 2)\n",
    )
    overrides = {
        "reward.type": "custom", "reward.custom_module": name, "algorithm.advantage_mode": "maxrl",
        "training.keep_checkpoints": 1, "training.max_steps": 5,
    }  # fmt: skip

    class Breaking(Listener):
        def on_step(self, metrics, generations):
            super().on_step(metrics, generations)
            if metrics["step"] == 3:
                marker.touch()

    config_ = load_config(write_config(tmp_path, tmp_path / "run"), overrides=overrides)
    with pytest.raises(RetrainError, match=r"outside \[0, 1\](.|\n)*Checkpoint of step 3 written") as raised:
        train(config_, observer=Breaking())
    assert type(raised.value) is RetrainError
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step*")) == ["step_000002", "step_000003"]
    marker.unlink()
    assert run(tmp_path, {**overrides, "resume.from": str(tmp_path / "run")}).rows[0]["step"] == 4


def test_out_of_memory_is_said_once_and_kept_over_a_resume(tmp_path, monkeypatch):
    import torch

    from retrain.backend.model import Policy

    hidden = Policy.hidden

    def small(self, tokens_RS, *rest):
        if self.peft.training and tokens_RS.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden(self, tokens_RS, *rest)

    overrides = {**LEARNING, "training.max_steps": 2, "training.micro_batch_tokens": 4096}
    monkeypatch.setattr(Policy, "hidden", small)
    listener = run(tmp_path, overrides)
    said = [line for line in listener.lines if "out of memory" in line]
    fits = [row["micro_batch_tokens"] for row in listener.rows if row["loss"] is not None]
    assert fits[-1] <= 100
    assert f"training.micro_batch_tokens = {fits[-1]} (now 4096)" in said[-1]
    assert len(said) == len(set(fits)), "once for each value"
    monkeypatch.undo()
    again = run(tmp_path, {**overrides, "training.max_steps": 3, "resume.from": str(tmp_path / "run")})
    assert any(f"did not fit into memory before: going on with {fits[-1]}" in line for line in again.lines)
    assert {row["micro_batch_tokens"] for row in again.rows} <= {fits[-1], None}


def test_another_budget_takes_the_place_of_the_one_that_fitted():
    state = TrainerState(seed=1, fitting={"configured": 16384, "fits": 512})
    said = []
    assert _fitting(config(), state, said.append).training.micro_batch_tokens == 512
    assert len(said) == 1
    assert state.fitting is not None
    changed = config(training__micro_batch_tokens=8192)
    assert _fitting(changed, state, said.append) is changed
    assert state.fitting is None
    assert len(said) == 1
