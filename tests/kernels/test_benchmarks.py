"""The benchmarks: their command lines, what they refuse to print, and the memory promise that holds on any machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retrain_kernels

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
TINY = {
    "linear_logprob": "--rows 33 --hidden 16 --vocab 301 --chunk-rows 10",
    "token_advantages": "--tokens 203 --completions 5 --group 4",
    "policy_loss": "--tokens 203 --completions 5",
    "training_step": "--hidden 32 --layers 1 --vocab 1000 --prompts 2 --group 2 --tokens 6 --prompt-tokens 4",
}
# What the memory promise is about; the others need no more than a tiny shape.
LARGE_VOCABULARY = {
    "linear_logprob": "--rows 192 --hidden 16 --vocab 151936",
    "training_step": "--hidden 32 --layers 1 --vocab 151936 --prompts 2 --group 4 --tokens 24 --prompt-tokens 8",
}
ONCE = "--device cpu --threads 1 --rounds 1 --warmup 1"
FIGURES = {
    "key",
    "name",
    "computes",
    "status",
    "errors",
    "allowed_errors",
    "milliseconds",
    "time_over_ours",
    "peak_bytes_over_inputs_and_outputs",
}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")


@pytest.fixture
def load(monkeypatch):
    """Import a script of the benchmarks' folder."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(name, flags):
    """A script as a user calls it; what it printed and its exit status."""
    paths = os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER.parent)])
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags.split()]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False
    )


def main(module, name, path, more=""):
    """The same in this process, so that it can be tampered with: exit status and record."""
    status = module.main([*f"{TINY[name]} {ONCE} {more}".split(), "--json", str(path)])
    record = json.loads(path.read_text())
    return status, record, {entry["key"]: entry for entry in record["entries"]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of a script against plain PyTorch through its command line: the flags, what it did, and its record."""
    done = {}

    def once(name):
        if name not in done:
            path = tmp_path_factory.mktemp(name) / "new" / "record.json"
            flags = f"{(TINY | LARGE_VOCABULARY)[name]} {ONCE} --only plain --json {path}"
            finished = run(name, flags)
            assert finished.returncode == 0, finished.stderr
            done[name] = flags, finished, json.loads(path.read_text())
        return done[name]

    return once


@pytest.mark.parametrize("name", TINY)
def test_the_command_line_checks_times_and_records(recorded, name):
    flags, done, record = recorded(name)
    assert record["benchmark"] == name
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["threads"] == 1
    assert record["command"].endswith(flags)
    assert {"date", "shape", "dtype", "settings", "targets", "complaints"} <= record.keys()
    assert [entry["key"] for entry in record["entries"]] == ["ours", "plain"]
    for entry in record["entries"]:
        assert entry.keys() == FIGURES
        assert entry["status"] == "ok"
        assert entry["errors"]
        assert all(error <= entry["allowed_errors"][key] for key, error in entry["errors"].items())
        assert len(entry["milliseconds"]["rounds"]) == 1
        assert entry["name"] in done.stdout
        assert f"{entry['time_over_ours']['median']:.3g}x" in done.stdout


def test_without_json_it_prints_every_contender():
    done = run("linear_logprob", f"{TINY['linear_logprob']} {ONCE} --only plain chunked liger products")
    assert done.returncode == 0, done.stderr
    for name in ("retrain (reference)", "PyTorch, all logits", "PyTorch, chunked", "Liger", "three products"):
        assert name in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled, not interpreted")
@pytest.mark.parametrize("name", ["linear_logprob", "token_advantages", "policy_loss"])
def test_the_kernels_can_be_asked_for(load, name, tmp_path):
    status, record, entries = main(load(name), name, tmp_path / "record.json", "--impl triton --only plain")
    assert status == 0
    assert record["settings"]["impl"] == "triton"
    assert entries["ours"]["name"].startswith("retrain (triton)")


def test_what_is_not_installed_is_said(load, monkeypatch, tmp_path, capsys):
    module = load("linear_logprob")
    monkeypatch.setattr(load("harness"), "find_spec", lambda name: None)
    status, _, entries = main(module, "linear_logprob", tmp_path / "record.json", "--only liger trl")
    assert status == 0
    assert entries["liger"]["status"] == "not installed: pip install liger-kernel"
    assert entries["trl"]["status"] == "not installed: pip install trl"
    assert entries["trl"]["milliseconds"] is None
    assert "not installed: pip install trl" in capsys.readouterr().out


def corrupt(monkeypatch, load, name, damage):
    """Let our implementation of `name` yield other results."""
    module = load(name)
    if name in ("linear_logprob", "training_step"):
        sound = retrain_kernels.linear_logprob
        monkeypatch.setattr(module, "linear_logprob", lambda *a, **k: (damage((o := sound(*a, **k))[0]), o[1]))
        return module
    sound = module.dispatch.implementation

    def implementation(*arguments, **keywords):
        compute = sound(*arguments, **keywords)
        if name == "token_advantages":
            return lambda *a, **k: damage(compute(*a, **k))
        return lambda *a, **k: (damage((o := compute(*a, **k))[0]), o[1])

    monkeypatch.setattr(module.dispatch, "implementation", implementation)
    return module


# With log-probs that are no numbers the engine refuses the step by itself.
@pytest.mark.parametrize(
    ("name", "factor"), [*((name, 1.001) for name in TINY), *((name, float("nan")) for name in list(TINY)[:3])]
)
def test_a_wrong_implementation_gets_no_speed_up(load, monkeypatch, name, factor, tmp_path, capsys):
    module = corrupt(monkeypatch, load, name, lambda result: result * factor)
    status, record, entries = main(module, name, tmp_path / "record.json", "--only plain")
    assert status == 1
    assert entries["ours"]["status"].startswith("check failed: ")
    assert all(entry["time_over_ours"] is None and entry["milliseconds"] is None for entry in record["entries"])
    printed = capsys.readouterr()
    assert "1x" not in printed.out
    assert "No speed-up is reported" in printed.err


def test_a_wrong_contender_gets_no_speed_up_and_the_others_do(load, monkeypatch, tmp_path, capsys):
    module = load("linear_logprob")
    sound = module.plain
    monkeypatch.setattr(module, "chunked", lambda rows: lambda *a: (sound(*a)[0], sound(*a)[1] + 1e-3))
    status, _, entries = main(module, "linear_logprob", tmp_path / "record.json", "--only plain chunked")
    assert status == 1
    assert entries["chunked"]["status"].startswith("check failed: entropy is off by")
    assert entries["chunked"]["time_over_ours"] is None
    assert entries["plain"]["time_over_ours"]["median"] > 0
    assert "PyTorch, chunked: check failed" in capsys.readouterr().err


def test_a_broken_yardstick_passes_nothing(load, monkeypatch, tmp_path):
    module = load("linear_logprob")
    sound = module.plain

    def broken(hidden, weight, targets):
        logprob, entropy = sound(hidden, weight, targets)
        return (logprob, entropy) if hidden.dtype == torch.float64 else (logprob * 1.5, entropy * 1.5)

    monkeypatch.setattr(module, "plain", broken)
    status, _, entries = main(module, "linear_logprob", tmp_path / "record.json", "--only plain")
    assert status == 1
    assert entries["ours"]["status"] == "ok"
    assert entries["plain"]["status"].startswith("check failed")


def test_requiring_what_cannot_be_judged_fails(load, tmp_path):
    status, record, _ = main(
        load("token_advantages"), "token_advantages", tmp_path / "record.json", "--only plain --require"
    )
    assert status == 1
    assert record["complaints"] == ["--require: there is no target that this run could judge"]


def test_a_missed_target_fails_only_where_it_is_required(load, monkeypatch, tmp_path):
    module = load("linear_logprob")
    harness = load("harness")
    monkeypatch.setattr(module, "targets_of", lambda args: lambda entries: [harness.Target("size", 2.0, 1.0)])
    assert main(module, "linear_logprob", tmp_path / "record.json", "--only plain")[0] == 0
    status, record, _ = main(module, "linear_logprob", tmp_path / "record.json", "--only plain --require")
    assert status == 1
    assert record["complaints"] == ["TARGET MISSED: size 2, at most 1"]


@pytest.mark.parametrize("flags", ["--rows 0", "--rounds -1", "--only nobody", "--dtype fp8"])
def test_bad_flags_are_refused(load, flags):
    with pytest.raises(SystemExit) as stopped:
        load("linear_logprob").main(f"{ONCE} {TINY['linear_logprob']} {flags}".split())
    assert stopped.value.code


@linux_only
def test_peak_memory_is_what_was_allocated(load):
    peak = load("harness").peak_bytes
    mebibyte = 2**20

    def allocate(temporary, kept, pieces=1):
        def call(_):
            passing = [torch.ones(temporary * mebibyte // 4 // pieces) for _ in range(pieces)]
            del passing
            return {"kept": torch.ones(kept * mebibyte // 4)}

        return call

    # Large before small, and many small ones: what malloc keeps of one call must not hide the next.
    for temporary, kept, pieces in ((80, 0, 1), (20, 0, 1), (24, 4, 24), (50, 30, 1), (20, 0, 1)):
        measured = peak(allocate(temporary, kept, pieces), torch.device("cpu")) / mebibyte
        assert measured == pytest.approx(temporary - kept, abs=1.5)


@linux_only
@pytest.mark.parametrize("name", LARGE_VOCABULARY)
def test_a_large_vocabulary_takes_a_quarter_of_the_memory_of_its_logits(recorded, name):
    _, _, record = recorded(name)
    ours, plain = (entry["peak_bytes_over_inputs_and_outputs"] for entry in record["entries"])
    rows = record["shape"].get("N") or record["shape"]["tokens"]
    assert plain >= rows * 151936 * 4  # it did hold the logits
    assert ours <= plain / 4
    targets = {target["name"]: target["met"] for target in record["targets"]}
    assert targets["peak memory over that of all logits"]


def test_all_runs_every_benchmark_and_says_what_it_could_not(load, monkeypatch, tmp_path, capsys):
    module = load("all")
    commands = []
    monkeypatch.setattr(module, "run", lambda command, extra=None: commands.append(command) or 0)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.main([str(tmp_path / "results"), "--require", "--rounds", "3"]) == 0
    assert [Path(command[1]).stem for command in commands] == list(TINY)
    for command in commands:
        script = Path(command[1])
        assert script.is_file()
        record = tmp_path / "results" / f"{script.stem}.json"
        assert command[2:] == ["--require", "--rounds", "3", "--json", str(record)]
    assert json.loads((tmp_path / "results" / "sanitizer.json").read_text()) == {
        "not_run": "compute-sanitizer is not on PATH"
    }
    assert "compute-sanitizer: not run" in capsys.readouterr().out


def test_all_sanitizes_where_it_can_and_fails_if_anything_does(load, monkeypatch, tmp_path):
    module = load("all")
    sanitized = []

    def pretend(command, extra=None):
        if command[0] == "/bin/sanitizer":
            sanitized.append(command)
            assert extra == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            return 86 if "racecheck" in command else 0
        return 0

    monkeypatch.setattr(module, "run", pretend)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/bin/sanitizer")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    assert module.main([str(tmp_path)]) == 1
    assert len(sanitized) == len(module.TOOLS) * len(module.SANITIZED)
    statuses = json.loads((tmp_path / "sanitizer.json").read_text())["exit_status"]
    assert {name for name, status in statuses.items() if status} == {f"racecheck {n}" for n in module.SANITIZED}
