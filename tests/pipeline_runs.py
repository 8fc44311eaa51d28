"""Runs that sample ahead: the same experiment by staleness and devices. Fixtures, for `pytest_plugins`."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import retrain, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def config(folder):
    """Writes the config of a run into `log_dir`."""

    def write(log_dir: Path) -> Path:
        place = folder / f"config-{log_dir.name}"
        place.mkdir()
        evaluates = "eval_fraction = 0.1\n[eval]\nevery = 3\nexamples = 4\n"
        path = write_config(place, log_dir, learns=True)
        path.write_text(path.read_text().replace('source = "arithmetic"\n', f'source = "arithmetic"\n{evaluates}'))
        return path

    return write


@pytest.fixture(scope="module")
def run(folder, config):
    """Runs of the same experiment, each made once: by staleness and devices."""
    made: dict[tuple[int, str], Path] = {}

    def make(staleness: int, devices: str = "cpu") -> Path:
        if (staleness, devices) not in made:
            log_dir = folder / f"{staleness}-{devices.replace(',', '-')}"
            done = retrain(config(log_dir), "--max-staleness", staleness, "--devices", devices)
            assert done.returncode == 0, done.stderr
            made[staleness, devices] = log_dir
        return made[staleness, devices]

    return make
