"""Campaigns without their runs: folders, manifests, results, how many at a time, the schedule with real jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from campaign_rig import CAMPAIGN, finished_campaign, load, manifest_of, write_campaign
from retrain import ConfigError, RetrainError
from retrain.campaign import folder as folders
from retrain.campaign import placement, results
from retrain.campaign.local import LocalExecutor
from retrain.campaign.manifest import config_digest, differences, read_manifest
from retrain.campaign.run import _error, placed, run_campaign
from retrain.campaign.schedule import Job, run_jobs
from retrain.campaign.squeeze import flags
from retrain.campaign.table import tables
from retrain.cli import main
from retrain.config import run_matrix, to_dict, without_effect_in_campaign
from retrain.training import durable
from retrain.training.folder import RunFolder
from wandb_file import history, run_record

TWO_BY_THREE = """
[campaign]
seeds = [1, 2, 3]
max_steps = 20
[[campaign.conditions]]
name = "a"
[[campaign.conditions]]
name = "b"
"""


# ---- results


def test_results_by_hand(tmp_path: Path) -> None:
    """Twenty steps: the last tenth is two of them; a step without a rate counts for neither measure."""
    rates: dict[str, list[float | None]] = {
        "a_s1": [0.0] * 18 + [0.2, 0.4],
        "a_s2": [0.1] * 18 + [None, 0.5],
        "a_s3": [0.0] * 20,
        "b_s1": [0.0] * 18 + [0.6, 0.8],
        "b_s2": [0.1] * 18 + [0.9, 0.9],
    }
    manifest = finished_campaign(tmp_path, rates, load(tmp_path, TWO_BY_THREE), b_s3="failed")
    found = results.measure(tmp_path, manifest)
    assert found["runs"]["a_s1"] == {
        "condition": "a",
        "seed": 1,
        "last_tenth": pytest.approx(0.3),
        "whole_run": pytest.approx(0.03),
    }
    assert found["runs"]["a_s2"]["last_tenth"] == 0.5
    assert found["runs"]["a_s2"]["whole_run"] == pytest.approx((1.8 + 0.5) / 19)
    assert found["missing"] == {"b_s3": "failed"}
    assert (found["baseline"], found["last_steps"]) == ("a", 2)
    other = found["measures"]["last_tenth"]["comparisons"]["b"]
    assert other["seeds"] == [1, 2], "the seed that b lacks is in no pair"
    assert other["mean"] == pytest.approx(0.4)
    assert found["measures"]["last_tenth"]["conditions"]["a"]["n"] == 3
    json.dumps(found, allow_nan=False)


def test_a_run_without_any_rate_is_left_out(tmp_path: Path) -> None:
    rates: dict[str, list[float | None]] = {name: [0.5] * 20 for name in ("a_s1", "a_s2", "a_s3", "b_s1", "b_s2")}
    rates["b_s3"] = [*[0.5] * 18, None, None]
    manifest = finished_campaign(tmp_path, rates, load(tmp_path, TWO_BY_THREE))
    assert results.measure(tmp_path, manifest)["missing"] == {"b_s3": "no step of the last tenth has a reward"}


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (9, 1), (10, 1), (11, 2), (50, 5), (500, 50)])
def test_last_tenth(steps: int, last: int) -> None:
    assert results.last_steps(steps) == last


def printed(found: dict[str, Any]) -> str:
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
    for part in tables(found):
        console.print(part)
    console.file.close()
    return console.export_text()


def test_the_table_says_what_it_cannot_say(tmp_path: Path) -> None:
    noisy = {"a_s1": 0.3, "a_s2": 0.5, "a_s3": 0.1, "b_s1": 0.35, "b_s2": 0.4, "b_s3": 0.3}
    config = load(tmp_path, TWO_BY_THREE)
    rates: dict[str, list[float | None]] = {name: [rate] * 20 for name, rate in noisy.items()}
    text = printed(results.measure(tmp_path / "noisy", finished_campaign(tmp_path / "noisy", rates, config)))
    assert "cannot tell" in text
    assert "no effect" in text
    assert "cannot give less than p = 0.25" in text
    assert "+5.0" in text
    clear: dict[str, list[float | None]] = {
        f"{name}_s{seed}": [base + 0.01 * seed + 0.001 * (seed == 2)] * 20
        for name, base in (("a", 0.2), ("b", 0.7))
        for seed in (1, 2, 3)
    }
    clear["b_s1"] = [0.7095] * 20
    text = printed(results.measure(tmp_path / "clear", finished_campaign(tmp_path / "clear", clear, config)))
    assert "higher" in text
    assert "cannot tell" not in text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    config = load(tmp_path, TWO_BY_THREE, campaign__seeds=[1])
    manifest = finished_campaign(tmp_path, {"a_s1": [0.5] * 20, "b_s1": [0.7] * 20}, config)
    found = results.measure(tmp_path, manifest)
    assert found["measures"]["whole_run"]["comparisons"]["b"]["low"] is None
    assert "one seed: no interval and no test exists" in printed(found)


def test_nothing_finished(tmp_path: Path) -> None:
    config = load(tmp_path, TWO_BY_THREE, campaign__seeds=[1])
    manifest = finished_campaign(tmp_path, {}, config, a_s1="failed", b_s1="failed")
    assert "there is nothing to compare" in printed(results.measure(tmp_path, manifest))


# ---- folder and manifest


def test_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = manifest_of(load(tmp_path), sepa_s11="failed")
    manifest.runs["sepa_s11"].error = "why"
    manifest.squeeze = {"run": "x", "analysis": {"ranks": [1]}}
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    manifest_of(load(tmp_path)).write(tmp_path)
    path = tmp_path / "manifest.json"
    good = path.read_text()
    for text in ("", "{", "[]", good[:-40], good.replace("batch_size", "bach_size"), good.replace('"state"', '"stat"')):
        path.write_text(text)
        with pytest.raises(RetrainError, match=str(path)):
            read_manifest(tmp_path)
    values = json.loads(good)
    del values["sha256"]
    durable.write_sealed_json(path, values | {"format": 2})
    with pytest.raises(RetrainError, match="another version"):
        read_manifest(tmp_path)


def test_a_campaign_of_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    finished_campaign(tmp_path / "c", {}, load(tmp_path))
    same = load(tmp_path, campaign__max_workers=7, logging__log_dir="elsewhere", campaign__parallel=False)
    folders.check(tmp_path / "c", same)
    other = CAMPAIGN.replace('name = "sepa"', 'name = "sepa"\noverrides = { "sepa.steps" = 3 }')
    with pytest.raises(ConfigError) as refused:
        folders.check(tmp_path / "c", load(tmp_path, other, training__lr=0.5))
    text = str(refused.value)
    assert "training.lr: 0.001 there, 0.5 here" in text
    assert "campaign.conditions[1].overrides.sepa.steps: absent there, 3 here" in text
    assert "batch_size" not in text


def test_digest_and_differences_agree(tmp_path: Path) -> None:
    base = to_dict(load(tmp_path))
    changes: list[dict[str, Any]] = [
        {"campaign__max_steps": 5},
        {"campaign__executor": "ray"},
        {"training__lr": 3.0},
        {},
    ]
    for overrides in changes:
        other = to_dict(load(tmp_path, **overrides))
        assert (config_digest(base) == config_digest(other)) == (differences(base, other) == [])


def test_only_a_new_or_empty_folder_or_a_campaign_will_do(tmp_path: Path) -> None:
    config = load(tmp_path)
    folders.check(tmp_path / "new", config)
    (tmp_path / "begun" / "runs").mkdir(parents=True)
    (tmp_path / "begun" / ".lock").touch()
    folders.check(tmp_path / "begun", config)
    with pytest.raises(ConfigError, match="holds something else"):
        folders.check(tmp_path, config)
    with pytest.raises(ConfigError, match="is a file"):
        folders.check(tmp_path / "campaign.toml", config)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from retrain.training.folder import RunFolder\n"
    code += "lock = RunFolder(Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
        run_campaign(load(tmp_path), str(tmp_path / "c"))
    other.communicate(b"")
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_an_unfinished_campaign_is_remembered(tmp_path: Path) -> None:
    config = load(tmp_path)
    logs = tmp_path / "logs"
    assert folders.unfinished(config, logs) is None
    older, newer = logs / "campaign_20260101T000000Z", logs / "campaign_20260102T000000Z"
    finished_campaign(older, {}, config)
    finished_campaign(newer, {}, config, sepa_s11="running")
    assert folders.unfinished(config, logs) == newer
    said: list[str] = []
    folders.hint_of_unfinished(config, None, said.append)
    assert said[0].startswith(f"{newer} is this campaign with 1 of 2 runs finished")
    assert folders.unfinished(load(tmp_path, training__lr=9.0), logs) is None
    lock = RunFolder(newer)
    assert folders.unfinished(config, logs) is None, "it is running"
    lock.close()
    new = folders.choose_folder(config, None)
    assert (new.parent, new.exists()) == (logs, False)


def test_state_is_what_the_runs_say(tmp_path: Path) -> None:
    """A parent that was killed left "running" behind: a run has ended where its own metadata says so."""
    config = load(tmp_path)
    finished_campaign(tmp_path / "c", {}, config, **{"grpo+none_s11": "running", "sepa_s11": "running"})
    for name, session in {
        "grpo+none_s11": {"status": "finished", "to_step": 6},
        "sepa_s11": {"status": "finished", "to_step": 4},
    }.items():
        (tmp_path / "c/runs" / name).mkdir()
        durable.write_sealed_json(tmp_path / "c/runs" / name / "metadata.json", {"sessions": [session]})
    manifest = folders.open_manifest(tmp_path / "c", config, run_matrix(config))
    assert [entry.state for entry in manifest.runs.values()] == ["finished", "waiting"]


# ---- configs of the runs


def test_trackers_are_told_the_condition(tmp_path: Path) -> None:
    config = load(tmp_path, logging__wandb_project="p", logging__wandb_tags="mine")
    run = run_matrix(config)[1]
    config_of_run = placed(run, Path("c/runs/sepa_s11"), "gpu:1")
    logging = config_of_run.logging
    assert (logging.wandb_run_name, logging.wandb_group, logging.wandb_tags) == ("sepa_s11", "sepa", "sepa,seed11,mine")
    assert (logging.log_dir, config_of_run.backend.devices) == ("c/runs/sepa_s11", "gpu:1")
    assert config_of_run.algorithm == run.config.algorithm


def test_a_flag_wins_over_the_files_steps(tmp_path: Path) -> None:
    config = load(tmp_path, TWO_BY_THREE, training__max_steps=3)
    assert {run.config.training.max_steps for run in run_matrix(config)} == {3}
    config = load(tmp_path, TWO_BY_THREE, training__max_steps=3, campaign__max_steps=4)
    assert {run.config.training.max_steps for run in run_matrix(config)} == {4}


def test_keys_that_a_campaign_replaces_are_said(tmp_path: Path) -> None:
    config = load(tmp_path, TWO_BY_THREE, campaign__max_workers=3, logging__wandb_group="g", logging__wandb_project="p")
    lines = without_effect_in_campaign(config, [run.config for run in run_matrix(config)])
    assert [line.partition(":")[0] for line in lines] == [
        "training.seed = 11",
        "training.max_steps = 6",
        'logging.wandb_group = "g"',
        "campaign.max_workers = 3",
    ]


def test_squeeze_keys_become_flags(tmp_path: Path) -> None:
    config = load(tmp_path, CAMPAIGN, squeeze__target_ranks=[1, 2], squeeze__min_variance_retention=0.5)
    assert flags(config) == ["--squeeze.min_variance_retention=0.5", "--squeeze.target_ranks=1,2"]


LOG_SQUEEZE = """
import sys
from pathlib import Path
from retrain.campaign.squeeze import log_to_wandb
from retrain.config import load_config
analysis = {"ranks": [1, 4], "mean_variance": {"1": 0.5, "4": 1.0}, "min_variance": {"1": 0.25, "4": 1.0}}
log_to_wandb(load_config(sys.argv[1]), Path(sys.argv[2]), analysis | {"recommended_rank": 4})
"""


def test_wandb_has_the_squeeze(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, CAMPAIGN)
    path.write_text(path.read_text().replace("[logging]", '[logging]\nwandb_project = "p"'))
    command = [sys.executable, "-c", LOG_SQUEEZE, str(path), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "WANDB_MODE": "offline"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run_record(written).display_name == "squeeze-analysis"
    rows = [{key: row[key] for key in row if key.startswith("squeeze/")} for row in history(written)]
    assert rows == [
        {"squeeze/mean_variance": 0.5, "squeeze/min_variance": 0.25},
        {"squeeze/mean_variance": 1.0, "squeeze/min_variance": 1.0},
    ]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--resume", "x"], "resume.from: a campaign goes on with --campaign-dir"),
        (["--seeds", "1,1"], "campaign.seeds: names a seed twice"),
        (["--seeds", ""], "campaign.seeds: must name at least one"),
        (["--campaign-dir", "."], "holds something else"),
        (["--executor", "ray", "--ray-address", "127.0.0.1:1"], "no Ray cluster there"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: str
) -> None:
    path = write_campaign(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([str(path), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["campaign.toml"]


def test_a_folder_of_a_campaign_is_not_one_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_campaign(tmp_path, "")), "--campaign-dir", "c"]) == 2
    assert "this config has no [campaign]" in capsys.readouterr().err


def test_ray_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "meta_path", [_NoRay(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "ray")
    assert main([str(write_campaign(tmp_path)), "--executor", "ray"]) == 2
    assert 'pip install "retrain[ray]"' in capsys.readouterr().err


class _NoRay:
    """An environment without Ray."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")


# ---- how many at a time


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(cores: int, gib: float) -> None:
        monkeypatch.setattr(placement, "usable_cores", lambda: cores)
        monkeypatch.setattr(placement, "available_bytes", lambda: int(gib * 2**30))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    return set_up


def test_as_many_as_fit(tmp_path: Path, machine: Any) -> None:
    def place(devices: str = "cpu", **keys: Any) -> placement.Placement:
        config = load(tmp_path, TWO_BY_THREE, backend__devices=devices, **{"campaign__parallel": True, **keys})
        return placement.place(config, run_matrix(config))

    machine(cores=4, gib=100)
    assert place().devices == ("cpu",) * 4
    assert place().threads == 0, "a small model takes one thread by itself"
    assert place(campaign__max_workers=3).devices == ("cpu",) * 3
    assert place(campaign__max_workers=99).devices == ("cpu",) * 6, "never more than there are runs"
    assert place(campaign__parallel=False).devices == ("cpu",)
    assert place("gpu:0,gpu:1").devices == ("gpu:0", "gpu:1")
    assert place("gpu:0,gpu:1", campaign__max_workers=3).devices == ("gpu:0", "gpu:1", "gpu:0")
    machine(cores=64, gib=1.3)
    assert place().devices == ("cpu",) * 2, "a process takes over half a GiB"
    assert "memory" in place().why
    machine(cores=64, gib=0.1)
    assert place().devices == ("cpu",), "one always runs"


def test_large_models_share_the_cores(tmp_path: Path, machine: Any) -> None:
    machine(cores=8, gib=1000)
    model: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    model |= {"intermediate_size": 2048, "vocab_size": 32000}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(model))
    keys = {"campaign__parallel": True, "campaign__max_workers": 4, "model__model": str(tmp_path / "model")}
    config = load(tmp_path, TWO_BY_THREE, **keys)
    assert placement.place(config, run_matrix(config)).threads == 2


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= placement.usable_cores() <= (os.cpu_count() or 1)
    assert placement.available_bytes() > 2**28


# ---- the schedule, with real processes


class Notes:
    """A watcher that remembers."""

    def __init__(self, then: dict[str, list[Job]] | None = None) -> None:
        self.then, self.began_at, self.statuses, self.most = then or {}, {}, {}, 0

    def began(self, job: Job) -> None:
        self.began_at[job.name] = time.monotonic()
        self.most = max(self.most, len(self.began_at) - len(self.statuses))

    def ended(self, job: Job, status: int) -> list[Job]:
        self.statuses[job.name] = status
        return self.then.get(job.name, [])

    def tick(self) -> None:
        pass


def job(folder: Path, name: str, *arguments: str) -> Job:
    return Job(name, lambda device: arguments, folder / f"{name}.out", folder / f"{name}.err")


def test_jobs_run_and_a_failure_takes_none_of_the_others_down(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "good", "schema"),
        job(tmp_path, "bad", "explain", "nothing.toml"),
        job(tmp_path, "v", "--version"),
    ]
    notes = Notes({"good": [job(tmp_path, "after", "--version")]})
    run_jobs(jobs, LocalExecutor(("", "")), notes)
    assert notes.statuses == {"good": 0, "bad": 2, "v": 0, "after": 0}
    assert notes.most == 2
    assert json.loads((tmp_path / "good.out").read_text())["title"] == "retrain configuration"
    assert _error(tmp_path / "bad.err", 0, 2).startswith("nothing.toml: no such file")
    assert (tmp_path / "v.out").read_text().startswith("retrain ")


def test_starts_are_staggered(tmp_path: Path) -> None:
    notes = Notes()
    jobs = [job(tmp_path, name, "--version") for name in "ab"]
    run_jobs(jobs, LocalExecutor(("", "")), notes, stagger_seconds=1.0)
    assert notes.began_at["b"] - notes.began_at["a"] >= 1.0


SLEEPER = "import time\ndef score(response, reference): return 0.0\nprint('up', flush=True)\ntime.sleep(600)\n"


def sleeper(folder: Path, name: str) -> Job:
    """A real command that takes long: a run whose reward module sleeps while it is imported."""
    (folder / f"slow_{name}.py").write_text(SLEEPER)
    path = write_campaign(folder / name, f'[reward]\ntype = "custom"\ncustom_module = "slow_{name}"\n')
    return job(folder, name, str(path))


def test_whatever_is_raised_no_job_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Broken(Notes):
        def began(self, job: Job) -> None:
            raise OSError("disk full")

    executor = LocalExecutor(("",))
    real = executor.start
    monkeypatch.setattr(executor, "start", lambda *arguments: started.append(real(*arguments)) or started[-1])
    with pytest.raises(OSError, match="disk full"):
        run_jobs([sleeper(tmp_path, "one")], executor, Broken())
    assert started[0].poll() == -signal.SIGKILL


def test_stopped_jobs_are_asked_once_and_waiting_ones_never_start(tmp_path: Path) -> None:
    notes = Notes()
    asked = iter([False, False] + [True] * 10_000)
    run_jobs(
        [sleeper(tmp_path, "one"), job(tmp_path, "two", "--version")],
        LocalExecutor(("",)),
        notes,
        interrupted=lambda: next(asked),
    )
    assert list(notes.statuses) == ["one"]
    assert notes.statuses["one"] in (-signal.SIGTERM, 130)


def test_an_old_error_is_not_taken_for_the_last_one(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("error: of yesterday\n")
    size = log.stat().st_size
    assert _error(log, 0, 1) == "of yesterday"
    assert _error(log, size, 1) == f"exit status 1; see {log}"
    with log.open("a") as file:
        file.write("step 1\nerror: of today\nand its remedy\n")
    assert _error(log, size, 1) == "of today and its remedy"
    assert _error(log, size, -9) == f"killed by signal 9; see {log}"
