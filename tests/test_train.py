"""The command that trains: what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from retrain import load_config
from retrain.assets import resolve_model
from retrain.config import to_dict
from runs import SMALL, environment, lines, retrain, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--eval-fraction", 0.1, "--eval-every", 3, "--eval-examples", 8, "--group-size", 8, "--max-tokens", 64]
    done = retrain(write_config(folder, folder / "run"), *flags, "--lora-dropout", 0)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    assert done.stderr == ""
    return folder / "run"


def test_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.toml",
        "credit.jsonl",
        "final",
        "generations.jsonl",
        "metadata.json",
        "metrics.jsonl",
        "trainer_state.json",
    }
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000002", "step_000004", "step_000006"]
    assert json.loads((run / "trainer_state.json").read_text()) == {"checkpoint": "checkpoints/step_000006", "step": 6}


def test_metrics(run: Path) -> None:
    rows = lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["condition"] == "grpo+gtpo_sepa_hicra"
        if row["num_datums"]:
            assert row["logprob_gap_max"] < 1e-4
            assert abs(row["ratio_mean"] - 1) < 1e-4
            assert row["clip_fraction"] == 0
    assert [row["eval_correct_rate"] is not None for row in rows] == [False, False, True, False, False, True]
    trained = [row for row in rows if row["num_datums"]]
    assert trained, "the fixture is to learn something"
    assert [row["policy_version"] for row in rows][-1] == len(trained)


def test_generations(run: Path) -> None:
    rows = lines(run / "generations.jsonl")
    assert len(rows) == 6 * 2 * 8
    for row in rows:
        assert row["finish_reason"] == ("length" if row["num_tokens"] == 64 else "stop") or row["num_tokens"] == 64
        assert row["reward"] in (0.0, 1.0)
        assert (f"\\boxed{{{row['reference']}}}" in row["completion"]) >= bool(row["reward"])


def test_config_is_resolved_and_loads(run: Path) -> None:
    config = load_config(run / "config.toml")
    assert config.training.group_size == 8
    assert config.data.eval_fraction == 0.1
    assert to_dict(config)["loss"]["kind"] == "importance_sampling"


def test_metadata(run: Path) -> None:
    facts = json.loads((run / "metadata.json").read_text())
    assert facts["seed"] == 11
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["parameters"] > 10 * facts["trainable_parameters"] > 0
    assert facts["sessions"][0]["status"] == "finished"
    assert facts["start"] <= facts["end"]


def test_closing_summary_can_be_run_as_it_stands(run: Path) -> None:
    """The PeftModel line and the resume line are code that works, not prose."""
    text = (run.parent / "stdout").read_text()
    use = next(line for line in text.splitlines() if "PeftModel.from_pretrained" in line).split(":", 1)[1].strip()
    code = f"from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\nassert {use} is not None\n"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment())
    go_on = next(line for line in text.splitlines() if line.startswith("go on:")).split()[3:]
    resumed = retrain(*go_on[:-1], 7)
    assert resumed.returncode == 0, resumed.stderr
    assert len(lines(run / "metrics.jsonl")) == 7


def test_final_adapter_works_with_peft_alone(run: Path) -> None:
    """transformers + PEFT, and nothing of retrain's, give the log-probs that the engine samples with."""
    from retrain.backend import open_backend
    from retrain.inference import open_engine

    config = load_config(run / "config.toml")
    backend = open_backend(config, seed=0, say=lambda line: None)
    backend.load_adapter(run / "final")
    engine = open_engine(config.inference, backend)
    prompt = backend.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 47 + 38?"}], add_generation_prompt=True, return_dict=False
    )
    import numpy as np

    streams = np.arange(4, dtype=np.uint64)[None]
    (completions,) = engine.generate([np.array(prompt)], streams, max_tokens=40, temperature=1.0)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("builtin:tiny"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of a name that transformers deprecates
        model = PeftModel.from_pretrained(base, str(run / "final")).eval()
    for completion in completions:
        ids = torch.tensor([[*prompt, *completion.tokens_T]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.from_numpy(completion.logprobs_T), expected, atol=1e-4, rtol=0)


def test_base_digest_is_that_of_the_files(run: Path) -> None:
    """The run checks its base at the end; here the digest is computed again from the model as it lies on disk."""
    import hashlib

    base = AutoModelForCausalLM.from_pretrained(resolve_model("builtin:tiny"), dtype=torch.float32)
    want = {hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for p in base.parameters()}
    from retrain.backend import open_backend

    config = load_config(run / "config.toml")
    backend = open_backend(config, seed=5, say=lambda line: None)
    backend.load(run / "checkpoints" / "step_000004")
    assert backend.base_digest() == json.loads((run / "metadata.json").read_text())["base_sha256"]
    from retrain.backend.local import LocalBackend

    assert isinstance(backend, LocalBackend)
    have = {hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for _, p in backend.policy.base_parameters()}
    assert have == want


def test_eval_command(run: Path) -> None:
    flags = ["--adapter", run / "final", "--json", "--samples", 4, "--eval-temperature", 1]
    done = retrain("eval", run / "config.toml", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["examples"] == 8
    assert set(result["pass_at"]) == {"1", "2", "4"}
    one, four = result["pass_at"]["1"], result["pass_at"]["4"]
    assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
    assert one["value"] <= four["value"]


REFUSED = [
    ("model folder", ["--model", "./nothing-here"], "./nothing-here"),
    ("steps", ["--max-steps", "0"], "max_steps"),
    ("misspelt flag", ["--max-step", "3"], "--max-steps"),
    ("source", ["--source", "arithmetics"], "arithmetic"),
    ("data file", ["--source", "missing.jsonl"], "missing.jsonl"),
    ("not at a service", ["--backend", "tinker"], "lora.dropout"),
    ("prompt too long", ["--max-tokens", "100000"], "context"),
    ("LoRA target", ["--target-modules", "q_prj"], "q_proj"),
    ("grams", ["--strategic-grams", "[1"], "strategic_grams"),
    ("GPU", ["--devices", "gpu:9"], "gpu:9"),
]


@pytest.mark.parametrize(("flags", "needle"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_before_anything_is_written(tmp_path: Path, flags: list[str], needle: str) -> None:
    done = retrain(write_config(tmp_path, tmp_path / "run"), *flags, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 4
    assert not (tmp_path / "run").exists()


def test_config_mistakes_name_the_place(tmp_path: Path) -> None:
    for text, needle in {
        "[training]\nlr = ": "broken.toml:2:",
        "[trainin]\nlr = 1e-3\n": "[training]",
        "[training]\nlearning_rate = 1e-3\n": "lr",
        '[training]\nlr = "fast"\n': "training.lr",
        "[training]\nlr = -1.0\n": "training.lr",
    }.items():
        path = tmp_path / "broken.toml"
        path.write_text(text)
        done = retrain(path, cwd=tmp_path)
        assert done.returncode == 2, text
        assert needle in done.stderr, (text, done.stderr)
        assert "Traceback" not in done.stderr


def test_no_config_at_all(tmp_path: Path) -> None:
    done = retrain(cwd=tmp_path)
    assert done.returncode == 2
    assert "retrain.toml" in done.stderr
    assert "retrain init" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_jsonl_data_and_math_reward(tmp_path: Path) -> None:
    rows = [{"question": f"What is {a} + 21?", "answer": f"{a + 21}.0"} for a in range(30, 40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--source", "data.jsonl", "--prompt-field", "question", "--reference-field", "answer"]
    flags += ["--reward-type", "math"]
    done = retrain(write_config(tmp_path, tmp_path / "run"), *flags, "--max-tokens", 48, "--max-steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    generations = lines(tmp_path / "run" / "generations.jsonl")
    assert {row["prompt"] for row in generations} <= {row["question"] for row in rows}
    assert all(row["error"] is None for row in generations)


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    done = retrain(write_config(tmp_path, tmp_path / "run"), "--source", "data.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "no example" in done.stderr


def test_seed_is_drawn_and_recorded(tmp_path: Path) -> None:
    seeds = set()
    for name in ("a", "b"):
        done = retrain(write_config(tmp_path, tmp_path / name), "--seed", -1, "--max-steps", 1)
        assert done.returncode == 0, done.stderr
        seeds.add(json.loads((tmp_path / name / "metadata.json").read_text())["seed"])
    assert len(seeds) == 2


def test_python_interface(tmp_path: Path) -> None:
    import retrain as package

    config = package.load_config(write_config(tmp_path, tmp_path / "run"), overrides={"training.max_steps": 2})
    result = package.train(config)
    assert result.log_dir == tmp_path / "run"
    assert result.steps == 2
    assert result.metrics is not None
    assert result.metrics["step"] == 2


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk takes root on Linux")
def test_full_disk(tmp_path: Path) -> None:
    """A real small disk that fills up: the run ends with a message, the last checkpoint is whole, and it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this container may not mount")
    try:
        log_dir = disk / "run"
        config = write_config(tmp_path, log_dir)
        done = retrain(config, "--max-steps", 40, "--save-every", 1, "--keep-checkpoints", 0)
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        (disk / "ballast").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        reached = json.loads((log_dir / "trainer_state.json").read_text())["step"]
        assert reached > 0
        done = retrain(log_dir / "config.toml", "--resume", log_dir, "--max-steps", reached + 1)
        assert done.returncode == 0, done.stderr
        assert len(lines(log_dir / "metrics.jsonl")) == reached + 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_small_config_is_what_the_tests_say() -> None:
    assert "dropout = 0.1" in SMALL  # so that the global random streams matter for an exact resume
