"""`init` writes configs that load, `doctor` says what is missing, and the generated pages are up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from retrain.cli import main
from retrain.cli.init import template_names
from retrain.config import load_config, run_kind

ROOT = Path(__file__).parents[1]
TEMPLATES = ("campaign", "gpu", "quickstart", "server", "squeeze", "tinker")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_promised_templates() -> None:
    assert tuple(template_names()) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_loads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--template", name, "new/c.toml"]) == 0
    assert "wrote new/c.toml" in capsys.readouterr().out
    config = load_config("new/c.toml")
    assert run_kind(config) == {"campaign": "campaign", "squeeze": "squeeze"}.get(name, "train")


def test_quickstart_is_the_first_run() -> None:
    assert main(["init"]) == 0
    config = load_config("retrain.toml")
    training, algorithm = config.training, config.algorithm
    assert (config.model.model, config.model.lora_rank) == ("builtin:tiny", 16)
    assert (config.backend.devices, config.data.source) == ("cpu", "arithmetic")
    assert (algorithm.advantage_mode, algorithm.transform_mode) == ("maxrl", "gtpo_sepa")
    assert (training.batch_size, training.group_size, training.max_tokens) == (8, 16, 64)
    assert (training.temperature, training.seed) == (1.0, 1)
    assert config.logging.log_dir == "logs/quickstart"


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("retrain.toml").write_text("# mine", encoding="utf-8")
    for argv in (["init"], ["init", "."], ["init", "retrain.toml", "--template", "gpu"]):
        assert main(argv) == 2
        assert "exists already and is not overwritten" in capsys.readouterr().err
    assert Path("retrain.toml").read_text(encoding="utf-8") == "# mine"


def test_wrong_template_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--template", "quikstart"]) == 2
    assert 'did you mean "quickstart"?' in capsys.readouterr().err
    Path("file").write_text("", encoding="utf-8")
    assert main(["init", "file/c.toml"]) == 2
    assert "file/c.toml: " in capsys.readouterr().err


# ---- doctor


def examine(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status = main(["doctor", *argv, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_run"] == (status == 0)
    return status, {finding["subject"]: finding for finding in answer["findings"]}


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A config that can run here: a local model, an available source, a place to write."""
    Qwen3Config(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    path = tmp_path / "ready.toml"
    path.write_text(
        f'[model]\nmodel = "{tmp_path / "model"}"\n[data]\nsource = "arithmetic"\n[backend]\ndevices = "cpu"\n',
        encoding="utf-8",
    )
    return path


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, findings = examine(capsys)
    assert status == 0
    assert findings["torch"]["level"] == "ok"
    assert findings["kernels"]["level"] == "ok"
    assert "model" not in findings


def test_ready(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, findings = examine(capsys, str(ready))
    assert status == 0
    assert findings["model"]["detail"].endswith("parameters")
    assert findings["device"] == {"level": "ok", "subject": "device", "detail": "cpu is cpu", "fix": ""}
    assert findings["kernels"]["detail"].startswith("plain PyTorch on cpu")
    assert findings["data"]["detail"] == "arithmetic: 12,105 examples to train on, 0 held out"
    assert main(["doctor", str(ready)]) == 0
    assert capsys.readouterr().out.endswith(f"{ready}: ready\n")


@pytest.mark.parametrize(
    ("flags", "subject", "detail"),
    [
        (["--devices", "gpu:77"], "device", "gpu:77"),
        (["--model", "./nothing"], "model", "no such folder"),
        (["--source", "nothing.jsonl"], "data", "no such file"),
        (["--model", "."], "model", "no readable config.json"),
        (["--log-dir", "ready.toml/x"], "log_dir", "cannot be written"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:9"], "engine", "does not answer"),
    ],
)
def test_what_is_missing(
    flags: list[str], subject: str, detail: str, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, findings = examine(capsys, str(ready), *flags)
    assert status == 1
    assert findings[subject]["level"] == "fail"
    assert detail in findings[subject]["detail"]


def test_a_missing_extra_that_the_config_needs(
    ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("retrain.cli.doctor.version", missing)
    _, findings = examine(capsys, str(ready), "--wandb-project", "p")
    assert findings["wandb"]["level"] == "fail"
    assert findings["wandb"]["fix"] == 'pip install "retrain[wandb]"'
    assert findings["ray"]["level"] == "note"
    assert findings["peft"]["level"] == "fail"


def test_a_model_to_be_downloaded_is_no_obstacle(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, findings = examine(capsys, str(ready), "--model", "no-such-org/no-such-model")
    assert status == 0
    assert findings["model"]["fix"] == "hf download no-such-org/no-such-model"


@pytest.mark.parametrize("source", ["math", "gsm8k", "no-such-org/no-such-data"])
def test_data_to_be_downloaded_is_no_obstacle(source: str, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, findings = examine(capsys, str(ready), "--source", source)
    assert status == 0
    assert findings["data"]["level"] == "note"
    assert findings["datasets"]["level"] == "ok"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_an_engine_that_answers(ready: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, findings = examine(capsys, str(ready), "--engine", "vllm", "--url", f"{server}/")
    assert findings["engine"]["level"] == "ok"
    assert "(200)" in findings["engine"]["detail"]


# ---- generated pages


def test_generated_pages_are_up_to_date() -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gen_docs.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == 0, process.stderr


def test_the_check_notices_a_stale_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("gen_docs", ROOT / "scripts/gen_docs.py")
    assert spec is not None
    assert spec.loader is not None
    gen_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gen_docs)
    monkeypatch.setattr(gen_docs, "DOCS", Path())
    monkeypatch.setattr(sys, "argv", ["gen_docs.py"])
    assert gen_docs.main() == 0
    page = Path("configuration.md").read_text(encoding="utf-8")
    assert "| `lr` | float | `4e-05` | >= 0 | Learning rate. | `--lr` |" in page
    monkeypatch.setattr(sys, "argv", ["gen_docs.py", "--check"])
    assert gen_docs.main() == 0
    Path("cli.md").write_text("old", encoding="utf-8")
    assert gen_docs.main() == 1
    assert capsys.readouterr().err == "stale: cli.md; run python scripts/gen_docs.py\n"
