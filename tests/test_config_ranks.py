"""What several processes cannot train together, and the command line of each of them."""

from __future__ import annotations

import pytest

from retrain.cli.ranks import take_nproc, without_nproc
from retrain.config import check_ranks
from retrain.config.build import build
from retrain.types import ConfigError

GROUPS = {"training.batch_size": 4, "training.group_size": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"backend.devices": "gpu:1"},
            'backend.devices = "gpu:1": each of 3 processes takes the GPU',
        ),
        ({"backend.devices": "mps"}, 'backend.devices = "mps": each of 3 processes'),
        ({"backend.devices": "gpu:0,gpu:1"}, 'backend.devices = "gpu:0,gpu:1": each of 3 processes'),
        ({"training.batch_size": 2}, "training.batch_size = 2: 3 processes share the groups of a step out"),
        (
            {"backpressure.enabled": True, "backpressure.min_batch_size": 2},
            "backpressure.min_batch_size = 2: 3 processes share",
        ),
        (
            {"backend.sharding": "fsdp", "environment.provider": "verifiers", "environment.id": "owner/name"},
            'backend.sharding = "fsdp": with an [environment]',
        ),
        ({"campaign.seeds": [1]}, "[campaign]: only the training of one run is shared out"),
    ],
)
def test_refused(values, message):
    config = build({}, overrides=GROUPS | values)
    with pytest.raises(ConfigError) as caught:
        check_ranks(config, 3)
    assert str(caught.value).startswith(message)
    check_ranks(config, 1)


@pytest.mark.parametrize("devices", ["cpu", "gpu", "gpu:0", "cuda"])
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_allowed(devices, sharding):
    check_ranks(build({}, overrides=GROUPS | {"backend.devices": devices, "backend.sharding": sharding}), 4)


def test_the_number_of_processes():
    assert (take_nproc(None), take_nproc("1"), take_nproc("12")) == (1, 1, 12)
    for text in ("0", "-1", "two", "", "1.5"):
        with pytest.raises(ConfigError, match="--nproc"):
            take_nproc(text)


def test_the_command_line_of_each_process():
    assert without_nproc(["--nproc", "2", "a.toml", "--lr", "1"]) == ["a.toml", "--lr", "1"]
    assert without_nproc(["a.toml", "--nproc=2", "--", "--nproc"]) == ["a.toml", "--", "--nproc"]
