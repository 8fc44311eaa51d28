"""Reasoning Gym: the same problems in every process, scored by their own tasks, trained on end to end."""

from __future__ import annotations

import ast
from contextlib import closing

import pytest
import reasoning_gym

import runs
from retrain import data, reward
from retrain.config import Config
from retrain.data import gym
from retrain.reward.reasoning_gym import final_answer
from retrain.types import ConfigError, Score

# An oracle answer in text; tuples that JSON would lose; NumPy strings; no oracle answer; sets whose order is the
# process's; the global random state.
TASKS = ("chain_sum", "rearc", "knights_knaves", "graph_color", "isomorphic_strings", "list_functions")


def load(tasks, count=3):
    return gym.load("reasoning_gym:" + ",".join(tasks), say=lambda line: None, count=count)


@pytest.fixture(scope="module")
def examples():
    return load(TASKS)


def entry_of(example):
    return ast.literal_eval(example.reference)


def test_tasks_take_turns(examples):
    assert [entry_of(example)["metadata"]["source_dataset"] for example in examples] == list(TASKS) * 3
    for example in examples:
        assert example.prompt == entry_of(example)["question"] + gym.ANSWER_INSTRUCTION


def test_every_process_makes_the_same_problems(examples, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert load(TASKS) == examples
    assert load(TASKS[::-1], count=2) == [examples[i] for i in (5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6)]


def test_entries_are_those_of_the_library(examples):
    made = reasoning_gym.create_dataset("chain_sum", seed=0, size=3)
    assert [entry_of(example) for example in examples[::6]] == list(made)


def test_the_data_source():
    section = Config().data.model_copy(update={"source": "reasoning_gym:chain_sum, dice", "eval_fraction": 0.3})
    said: list[str] = []
    loaded = data.load(section, max_examples=10, say=said.append)
    assert len(loaded.train) == 10
    assert 400 < len(loaded.eval) < 800
    assert said == [f"making {gym.PROBLEMS} problems of chain_sum, dice"]


@pytest.mark.parametrize(
    ("tasks", "needles"),
    [
        (["chain_summ"], ['no task "chain_summ"', "chain_sum"]),
        (["dice", "dice"], ["names a task twice"]),
        (["composite"], ['no task "composite"']),
        (["dice", ""], ['no task ""', "It has ab, acre"]),
        (["--help"], ['no task "--help"']),
    ],
)
def test_wrong_tasks(tasks, needles):
    with pytest.raises(ConfigError) as error:
        load(tasks)
    for needle in (f'data.source = "reasoning_gym:{",".join(tasks)}"', *needles):
        assert needle in str(error.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "retrain\[reasoning-gym\]"'):
        load(["dice"])


def test_a_task_that_fails_is_a_message(monkeypatch):
    monkeypatch.setattr(gym, "WORKER", "retrain.data.no_such_worker")
    with pytest.raises(ConfigError, match=r"Reasoning Gym failed: .*no_such_worker"):
        load(["dice"])


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so <answer>42</answer>", "42"),
        ("<answer>1</answer> no <answer>\n1 2\n3 4 </answer> done", "1 2\n3 4"),
        ("<answer>7</answer> or \\boxed{8}", "7"),
        ("so \\boxed{7} or \\boxed{8}", "8"),
        ("<answer>7 and \\boxed{8}", "8"),
        ("<answer></answer>", ""),
        ("<answer>7", None),
        ("7", None),
        ("", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.fixture(scope="module")
def scorer():
    with closing(reward.open_rewards(Config().reward, "reasoning_gym:chain_sum")) as opened:
        yield opened


def scores(scorer, pairs):
    return scorer.score([response for response, _ in pairs], [example.reference for _, example in pairs])


def test_the_right_answer_scores_one(examples, scorer):
    known = [example for example in examples if entry_of(example)["answer"] is not None]
    assert len(known) == 15
    pairs = [(f"<answer>{entry_of(example)['answer']}</answer>", example) for example in known]
    assert scores(scorer, pairs) == [Score(1.0)] * 15


def test_the_same_as_the_library_says(examples, scorer):
    """Other answers too: part of the credit, another problem's answer, an answer that only the task can judge."""
    answers = ["", "7", "x = 7", "True", str(entry_of(examples[0])["answer"]) + " apples", "{'0': 1, '1': 2}"]
    for example in examples:
        entry = entry_of(example)
        task = reasoning_gym.create_dataset(entry["metadata"]["source_dataset"])
        expected = [Score(float(task.score_answer(answer, entry))) for answer in answers]
        assert scores(scorer, [(f"<answer>{answer}</answer>", example) for answer in answers]) == expected


def test_no_answer_scores_zero(examples, scorer):
    assert scores(scorer, [("no answer", example) for example in examples]) == [Score(0.0)] * len(examples)


def test_a_scorer_that_fails_is_an_error_and_no_zero(scorer):
    (example,) = load(["prime_factorization"], count=1)
    (verdict,) = scores(scorer, [("<answer>seven</answer>", example)])
    assert verdict.value is None and verdict.error.startswith("reasoning-gym failed: ValueError")


def test_a_bomb_is_stopped():
    (example,) = load(["countdown"], count=1)
    section = Config().reward.model_copy(update={"timeout_s": 1.0})
    with closing(reward.open_rewards(section, "reasoning_gym:countdown")) as scorer:
        bomb, gold = scores(
            scorer,
            [("<answer>9**9**9**9</answer>", example), (f"<answer>{entry_of(example)['answer']}</answer>", example)],
        )
    assert gold == Score(1.0)
    assert bomb.value == 0.0 or "took longer than 1 s" in bomb.error or "died" in bomb.error


# ---------------------------------------------------------------- a run


def test_three_tasks_end_to_end(tmp_path):
    log_dir = tmp_path / "logs"
    keys = ("--source", "reasoning_gym:chain_sum,spell_backward,dice", "--max-examples", 3, "--max-steps", 2)
    keys = (*keys, "--batch-size", 3, "--eval-fraction", 0.05, "--eval-every", 2, "--eval-examples", 2)
    done = runs.retrain(runs.write_config(tmp_path, log_dir), *keys)
    assert done.returncode == 0, done.stderr
    rows = runs.lines(log_dir / "generations.jsonl")
    tasks = [ast.literal_eval(row["reference"])["metadata"]["source_dataset"] for row in rows]
    assert {task: tasks.count(task) for task in tasks} == {"chain_sum": 8, "spell_backward": 8, "dice": 8}
    assert all(row["reward"] is not None for row in rows)
    assert [row["reward_errors"] for row in runs.lines(log_dir / "metrics.jsonl")] == [0, 0]


def test_another_reward_is_refused(tmp_path):
    config = runs.write_config(tmp_path, tmp_path / "logs")
    done = runs.retrain(config, "--source", "reasoning_gym:dice", "--type", "math")
    assert done.returncode == 2
    assert "its tasks score by themselves; remove reward.type" in done.stderr
    assert not (tmp_path / "logs").exists()
