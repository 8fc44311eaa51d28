"""A campaign on a Ray cluster of two workers: the same folder, the same numbers, nothing left behind."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from campaign_rig import CAMPAIGN, write_campaign
from runs import assert_same_run, retrain, start

TWO_SEEDS = CAMPAIGN.replace("seeds = [11]", "seeds = [11, 12]").replace(
    '\n[[campaign.conditions]]\nname = "sepa"\n', "\n"
)


def test_the_runs_are_those_of_this_machine(tmp_path: Path) -> None:
    config, folder = write_campaign(tmp_path, TWO_SEEDS), tmp_path / "c"
    campaign = start(config, "--campaign-dir", folder, "--executor", "ray")
    try:
        stdout, stderr = campaign.communicate(timeout=400)
    finally:
        campaign.kill()
    assert campaign.returncode == 0, stderr
    assert "2 at a time" in stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [run["state"] for run in manifest["runs"].values()] == ["finished"] * 2
    assert (
        json.loads((folder / "results.json").read_text())["measures"]["last_tenth"]["conditions"]["grpo+none"]["n"] == 2
    )
    assert (folder / "report.html").is_file()
    alone = retrain(folder / "runs/grpo+none_s12.toml", "--log-dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    assert_same_run(folder / "runs/grpo+none_s12", tmp_path / "alone")


def test_killed_with_its_driver(tmp_path: Path) -> None:
    """Ray ends the actor of a driver that is gone, and with it the run."""
    folder = tmp_path / "c"
    campaign = start(
        write_campaign(tmp_path, TWO_SEEDS), "--campaign-dir", folder, "--executor", "ray", "--no-parallel"
    )
    deadline = time.monotonic() + 400
    log = folder / "runs/grpo+none_s11/console.log"
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline
        assert campaign.poll() is None, campaign.communicate()
        time.sleep(0.05)
    campaign.send_signal(signal.SIGKILL)
    campaign.communicate()
    needle = str(folder).encode()
    while any(needle in command for command in commands()):
        assert time.monotonic() < deadline, "a run outlives its campaign"
        time.sleep(0.2)


def commands() -> list[bytes]:
    """Command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
