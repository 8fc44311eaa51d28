"""Runs on a Ray cluster: the same processes as on this machine, each held by an actor where Ray finds room for it.

The folder of the campaign must be the same one on every node, as must the Python environment.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.campaign.local import Process
from retrain.campaign.placement import run_bytes, usable_cores
from retrain.types import ConfigError

if TYPE_CHECKING:
    from retrain.config import Config, Run

CONNECT_SECONDS = 10.0
INSTALL = 'pip install "retrain[ray]"'


class RayExecutor:
    """Connects to `campaign.ray_address`, or starts a cluster of this machine's cores that ends with this process.

    A run takes a CPU and the memory it is estimated to need, and where it trains on a GPU one of those. Raises
    ConfigError where Ray is not installed, the cluster does not answer, or it has no room for a single run.
    """

    def __init__(self, config: Config, matrix: tuple[Run, ...]) -> None:
        assert config.campaign is not None
        self._ray = _connect(config.campaign.ray_address)
        on_gpu = config.backend.devices != "cpu" and config.inference.engine == "pytorch"
        needed = {"CPU": 1.0, "GPU": float(on_gpu), "memory": float(run_bytes(matrix))}
        there = self._ray.cluster_resources()
        count = min(int(there.get(name, 0) // amount) for name, amount in needed.items() if amount)
        if count < 1:
            self.close()
            raise ConfigError(f"campaign.executor: a run needs {_said(needed)}; the cluster has {_said(there)}")
        self.why = f"as many as the Ray cluster has room for: {_said(there)}"
        if not config.campaign.parallel:
            count, self.why = 1, "campaign.parallel = false"
        elif config.campaign.max_workers:
            count, self.why = config.campaign.max_workers, f"campaign.max_workers = {config.campaign.max_workers}"
        # On its node, a run sees no GPU but its own.
        self.devices: tuple[str, ...] = ("gpu:0" if on_gpu else "",) * min(count, len(matrix))
        self._actor = self._ray.remote(num_cpus=1, num_gpus=int(on_gpu), memory=needed["memory"], max_restarts=0)(
            Process
        )

    def start(self, arguments: Sequence[str], stdout: Path, stderr: Path) -> RemoteProcess:
        actor = self._actor.remote(arguments, stdout, stderr, cwd=str(Path.cwd()))
        return RemoteProcess(self._ray, actor, stderr)

    def close(self) -> None:
        self._ray.shutdown()


class RemoteProcess:
    """A `Process` that an actor holds. See `retrain.campaign.schedule.Started`."""

    def __init__(self, ray: Any, actor: Any, stderr: Path) -> None:
        self._ray, self._actor, self._stderr = ray, actor, stderr
        self._asked = actor.poll.remote()

    def poll(self) -> int | None:
        if not self._ray.wait([self._asked], timeout=0)[0]:
            return None
        try:
            status = self._ray.get(self._asked)
        except self._ray.exceptions.RayError as error:
            # The node, or the actor's start, failed: the run cannot say so itself.
            with self._stderr.open("a", encoding="utf-8") as log:
                log.write(f"error: lost by Ray: {type(error).__name__}: {error}\n")
            return 1
        if status is None:
            self._asked = self._actor.poll.remote()
        else:
            self.kill()
        return status

    def stop(self) -> None:
        self._actor.stop.remote()

    def kill(self) -> None:
        # With the actor's process ends the one that is bound to it.
        self._ray.kill(self._actor)


def _connect(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(f'campaign.executor = "ray": Ray is not installed: {INSTALL}') from None
    address = address or os.environ.get("RAY_ADDRESS", "")
    _check_reachable(address)
    own: dict[str, Any] = {} if address else {"num_cpus": usable_cores(), "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f'campaign.ray_address = "{address}"' if address else 'campaign.executor = "ray"'
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{where}: no Ray cluster there: {reason}") from error
    finally:
        # Ray's own handler would end this process before its runs have written their checkpoints.
        signal.signal(signal.SIGTERM, before)
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or nothing
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f'campaign.ray_address = "{address}": no Ray cluster there: {error.strerror or error}'
        ) from None


def _said(resources: dict[str, float]) -> str:
    parts = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join([*parts, f"{resources.get('memory', 0) / 2**30:.1f} GiB"])
