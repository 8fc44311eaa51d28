"""wandb and TensorBoard: what they hold, read back, is what metrics.jsonl says; a resume goes on in both."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import wandb_file
from retrain import tracking
from retrain.config import build, load_config
from retrain.tracking import Guarded, open_trackers
from retrain.tracking.event_file import EventFile
from retrain.tracking.figures import figures, tracked_name, words
from retrain.training.checkpoint import TrainerState
from retrain.training.loop import Run
from retrain.training.metrics import BACKPRESSURE, FROM_LEARNER
from retrain.training.run import _start_trackers, train
from retrain.types import ConfigError
from runs import environment, lines, write_config

LOGGING = """
credit_samples = 3
tensorboard = true
wandb_project = "sums"
wandb_group = "small"
wandb_tags = "first, seed11"
[eval]
every = 0
"""


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "retrain", *map(str, arguments)],
        capture_output=True, text=True, env={**environment(), **variables}, timeout=300, check=False,
    )  # fmt: skip


def scalars(log_dir: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(log_dir / "tensorboard"), size_guidance={"scalars": 0})
    loaded.Reload()
    return {tag: {event.step: event.value for event in loaded.Scalars(tag)} for tag in loaded.Tags()["scalars"]}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, gone on with from its second to its fourth."""
    folder = tmp_path_factory.mktemp("tracked")
    log_dir = folder / "run"
    config = write_config(folder, log_dir, LOGGING)
    for arguments in (
        (config, "--max-steps", 3, "--no-skip-uniform-groups"),
        (log_dir / "config.toml", "--resume", log_dir / "checkpoints" / "step_000002", "--max-steps", 4),
    ):
        done = run(*arguments, WANDB_MODE="offline", WANDB_SILENT="true")
        assert done.returncode == 0, done.stderr
    return log_dir


def wandb_files(log_dir: Path) -> list[Path]:
    return sorted((log_dir / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_has_the_numbers_of_the_run(resumed: Path) -> None:
    metrics = {row["step"]: row for row in lines(resumed / "metrics.jsonl")}
    assert list(metrics) == [1, 2, 3, 4]
    first, second = map(wandb_file.history, wandb_files(resumed))
    assert [row["_step"] for row in first] == [1, 2, 3]
    assert [row["_step"] for row in second] == [3, 4]
    for row in (*first[:2], *second):
        own = {key: value for key, value in row.items() if not key.startswith("_")}
        assert own == figures(metrics[row["_step"]]) | words(metrics[row["_step"]])
    assert first[0]["train/rewards/mean_reward"] == metrics[1]["mean_reward"]
    assert first[0]["train/entropy/exec_mean"] == metrics[1]["exec_entropy_mean"]
    assert first[0]["train/condition"] == "grpo+gtpo_sepa_hicra"


def test_a_resume_is_the_same_run_at_wandb(resumed: Path) -> None:
    first, second = map(wandb_file.run_record, wandb_files(resumed))
    state = json.loads((resumed / "checkpoints" / "step_000004" / "loop.json").read_text())
    assert first.run_id == second.run_id == state["wandb_run_id"]
    assert (first.project, first.display_name, first.run_group) == ("sums", "grpo+gtpo_sepa_hicra", "small")
    assert list(first.tags) == ["first", "seed11"]
    settings = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert settings["training"]["lr"] == 1e-3
    assert settings["model"]["model"] == "builtin:tiny"


def test_tensorboard_has_the_numbers_of_the_run(resumed: Path) -> None:
    """Every number, as float32; of the third step those of the second session, the first's are taken out."""
    metrics = lines(resumed / "metrics.jsonl")
    found = scalars(resumed)
    expected: dict[str, dict[int, float]] = {}
    for row in metrics:
        for name, value in figures(row).items():
            expected.setdefault(name, {})[row["step"]] = float(np.float32(value))
    assert found == expected
    assert set(found["train/loss"]) == {1, 2, 3, 4}


def test_the_credit_of_a_run_is_that_of_its_completions(resumed: Path) -> None:
    rows, generations = lines(resumed / "credit.jsonl"), lines(resumed / "generations.jsonl")
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for row in rows:
        place = (row["step"], row["prompt_index"])
        written = [line for line in generations if (line["step"], line["prompt_index"]) == place][
            row["completion_index"]
        ]
        assert (written["reward"], written["advantage"]) == (row["reward"], row["advantage"])
        assert written["num_tokens"] == len(row["tokens"])
        np.testing.assert_allclose(max(row["uncertainty"]), written["uncertainty_max"], rtol=1e-3)
        np.testing.assert_allclose(np.mean(row["uncertainty"]), written["uncertainty_mean"], rtol=2e-3)
        assert "".join(row["tokens"]).startswith(written["completion"])


def test_a_fork_is_another_run() -> None:
    """And a run that goes on in its place is the same one; without wandb there is no id."""
    started: list[str | None] = []
    tracker = SimpleNamespace(start=lambda config, step, run_id: started.append(run_id))

    def start(project: str, was: str | None, *, forked: bool) -> str | None:
        config = build({}, {"logging.wandb_project": project})
        run = SimpleNamespace(config=config, state=TrainerState(seed=1, step=3, wandb_run_id=was), trackers=[tracker])
        _start_trackers(cast(Run, run), forked=forked)
        assert started[-1] == run.state.wandb_run_id
        return run.state.wandb_run_id

    assert start("sums", "0a1b2c3d", forked=False) == "0a1b2c3d"
    fresh = {
        start("sums", "0a1b2c3d", forked=True),
        start("sums", None, forked=False),
        start("sums", None, forked=True),
    }
    assert len(fresh) == 3
    assert all(re.fullmatch(r"[0-9a-f]{8}", run_id or "") for run_id in fresh)
    assert start("", None, forked=True) is None


def test_names() -> None:
    for key, name in (
        ("loss", "train/loss"),
        ("step", "train/step"),
        ("reward_time_s", "train/reward_time_s"),
        ("sepa_lambda", "train/sepa_lambda"),
        ("mean_reward", "train/rewards/mean_reward"),
        ("running_correct_rate", "train/rewards/running_correct_rate"),
        ("reward_errors", "train/rewards/errors"),
        ("reward_brevity", "train/rewards/brevity"),
        ("entropy_mean", "train/entropy/mean"),
        ("exec_entropy_var", "train/entropy/exec_var"),
        ("plan_entropy_mean", "train/entropy/plan_mean"),
        ("bp_p_star", "train/backpressure/p_star"),
    ):
        assert tracked_name(key) == name
    keys = {*FROM_LEARNER, *BACKPRESSURE, "mean_reward", "reward_errors", "correct_rate", "step"}
    assert len({tracked_name(key) for key in keys}) == len(keys)


def test_null_is_no_number_and_truth_is_one() -> None:
    metrics = {"loss": None, "sepa_gate_open": True, "policy_version": 0, "bp_action": "hold", "warnings": ["a"]}
    assert figures(metrics) == {"train/sepa_gate_open": 1, "train/policy_version": 0}
    assert words(metrics) == {"train/backpressure/action": "hold"}


@pytest.mark.parametrize(("key", "value"), [("wandb_project", "p"), ("tensorboard", True)])
def test_a_missing_package_is_said_before_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, value: object
) -> None:
    def missing(name: str) -> str:
        raise tracking.PackageNotFoundError(name)

    monkeypatch.setattr(tracking, "version", missing)
    config = build({}, {f"logging.{key}": value, "logging.log_dir": str(tmp_path / "run"), "data.source": "arithmetic"})
    with pytest.raises(ConfigError, match=rf'logging.{key}: \w+ is not installed: pip install "retrain\[\w+\]"'):
        tracking.train(config)
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    """Not logged in, not offline, and nobody to ask."""
    code = (
        "import sys; from retrain.config import build; from retrain.tracking.wandb_run import WandbRun; "
        "from retrain.types import ConfigError\n"
        "try: WandbRun().start(build({}, {'logging.wandb_project': 'sums', 'logging.log_dir': sys.argv[1]}), 0, 'a')\n"
        "except ConfigError as error: print(error); sys.exit(2)"
    )
    variables = {"WANDB_API_KEY": "", "WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment() | variables,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith('logging.wandb_project = "sums": wandb does not start: ')
    assert "WANDB_MODE=offline" in done.stdout


def test_a_tracker_that_cannot_start_stops_the_run_before_anything_is_written(tmp_path: Path) -> None:
    class Unwilling(Failing):
        def start(self, config: Any, step: int, run_id: str | None) -> None:
            raise ConfigError("no")

    config = load_config(write_config(tmp_path, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"^no$"):
        train(config, trackers=[Unwilling()])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


class Failing:
    """A tracker whose disk is full from step 2 on."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def start(self, config: Any, step: int, run_id: str | None) -> None:
        raise AssertionError("not called here")

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        self.seen.append(metrics["step"])
        if metrics["step"] == 2:
            raise OSError(28, "No space left on device")

    def finish(self, status: str) -> None:
        raise AssertionError("it was lost before")


def test_a_tracker_that_fails_is_said_once_and_left_alone() -> None:
    said: list[str] = []
    failing = Failing()
    guarded = Guarded(failing, "TensorBoard", said.append)
    for step in (1, 2, 3):
        guarded.on_step({"step": step}, [])
    guarded.finish("finished")
    assert failing.seen == [1, 2]
    (line,) = said
    assert line.startswith("TensorBoard failed at step 2 and gets nothing from here on (OSError: ")
    assert "The run goes on" in line


def test_trackers_are_those_that_are_named() -> None:
    assert open_trackers(build({}), print) == []
    (only,) = open_trackers(build({"logging": {"tensorboard": True}}), print)
    assert isinstance(only, Guarded)
    assert isinstance(only.tracker, EventFile)
