"""Running the real command in the tests, and comparing what two runs left behind."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from retrain.training.metrics import MEASURED

SMALL = """
[backend]
devices = "cpu"
[model]
model = "builtin:tiny"
lora_rank = 4
[lora]
dropout = 0.1
[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo_sepa_hicra"
[training]
seed = 11
max_steps = 6
batch_size = 2
group_size = 4
max_tokens = 12
temperature = 1.0
lr = 1e-3
save_every = 2
micro_batch_tokens = 64
gradient_checkpointing = false
lr_schedule = "cosine"
[sepa]
steps = 4
delay_steps = 1
correct_rate_gate = 0.0
schedule = "auto"
warmup = 2
[data]
source = "arithmetic"
[logging]
log_dir = "{log_dir}"
"""


def write_config(folder: Path, log_dir: Path, extra: str = "", *, learns: bool = False) -> Path:
    """learns: with groups and answers long enough that some completions are right, so that most steps train."""
    path = folder / "config.toml"
    small = SMALL.replace("group_size = 4\nmax_tokens = 12\n", "group_size = 8\nmax_tokens = 24\n") if learns else SMALL
    path.write_text(small.replace("{log_dir}", str(log_dir)) + extra, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def retrain(*arguments: object, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in a fork of a process that has imported everything (see `fork_server.py`)."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        files = {stream: str(Path(folder, stream)) for stream in ("stdout", "stderr")}
        request = {"arguments": words, "folder": str(cwd or Path.cwd()), "environment": environment(), **files}
        status = fork(request, timeout)
        out, err = (Path(name).read_text(encoding="utf-8") for name in files.values())
    return subprocess.CompletedProcess(["retrain", *words], status, out, err)


def fork(
    request: dict[str, Any], timeout: float, *, server: int = 0, started: Callable[[int], object] = lambda pid: None
) -> int:
    """Exit status, negative for a signal. Raises TimeoutExpired, with the process killed.

    server: which of the processes to fork; one forks one at a time. started: is told the process id.
    """
    process = fork_server(server)
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    pid = int(process.stdout.readline())
    started(pid)
    late = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
    late.start()
    status = int(process.stdout.readline())
    if late.finished.is_set():
        raise subprocess.TimeoutExpired(request["arguments"], timeout)
    late.cancel()
    return status


@cache
def fork_server(number: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    atexit.register(server.communicate)  # its stdin ends, and with it the server
    return server


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "retrain", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unmeasured(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what a clock or the operating system says."""
    return {key: value for key, value in row.items() if key not in MEASURED}


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: metrics that are not times, generations, the final adapter, and the last checkpoint's state."""
    assert [unmeasured(row) for row in lines(a / "metrics.jsonl")] == [
        unmeasured(row) for row in lines(b / "metrics.jsonl")
    ]
    for name in ("generations.jsonl", "credit.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    last = json.loads((a / "trainer_state.json").read_text())["checkpoint"]
    assert json.loads((b / "trainer_state.json").read_text())["checkpoint"] == last
    policies = [sorted(path.name for path in (run / last).glob("policy_*")) for run in (a, b)]
    assert policies[0] == policies[1]
    for name in (
        "final/adapter_model.safetensors",
        *(f"{last}/{policy}" for policy in policies[0]),
        f"{last}/adapter_model.safetensors",
        f"{last}/loop.json",
        f"{last}/trainer.safetensors",
    ):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
