"""`devices = "a,b"`: samples on the first device, in a process of its own, while the policy trains on the last.

Two processes, since two threads of one interpreter take turns: a small operation at a time is all that decoding does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

import numpy as np

from retrain.backend.local import LocalBackend
from retrain.inference import Engine
from retrain.plugin import child_environment
from retrain.types import Completion, ConfigError, RetrainError

END_S = 5.0


class SplitEngine(Engine):
    """See `retrain.inference.Engine`. A version is staged as bytes, and travels when it is used."""

    def __init__(self, backend: LocalBackend, say: Callable[[str], None]) -> None:
        """Raises ConfigError where the model cannot be used on the first device."""
        self.backend = backend
        self.policy_version, self.overlaps = 0, True
        self._staged: dict[int, bytes] = {}
        self._used: int | None = None
        self._device = backend.config.backend.samples_on
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "retrain.inference.sampler", str(theirs.fileno())],
                env=child_environment(),
                stdin=subprocess.PIPE,  # ends with this process, and the sampler with it
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the run, which ends the sampler itself
            )
        self._pipe = ours
        try:
            self.path, said = self._ask("open", backend.config)
        except BaseException:
            self.close()
            raise
        for line in said:
            say(f"sampling process: {line}")

    def generate(
        self, prompts: Sequence[np.ndarray], streams_PG: np.ndarray, *, max_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        return self._ask("generate", list(prompts), streams_PG, max_tokens, temperature)

    def stage(self, version: int) -> None:
        if version not in self._staged:
            self._staged[version] = self.backend.snapshot()

    def use(self, version: int) -> None:
        if version != self._used:
            self._ask("use", version, self._staged[version])
            self._used = self.policy_version = version
        self._staged = {staged: taken for staged, taken in self._staged.items() if staged >= version}

    def _ask(self, request: str, *arguments: Any) -> Any:
        """Raises ConfigError and RetrainError as the sampler does, and RetrainError where it has died."""
        try:
            self._pipe.send((request, *arguments))
            kind, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RetrainError(
                f"the process that samples on {self._device} died ({self._ending()}). Where memory is short, lower "
                "training.batch_size, group_size or max_tokens"
            ) from error
        except BaseException:
            # Its answer may still come, to a question that nobody asks any more.
            self._process.kill()
            raise
        match kind:
            case "config":
                raise ConfigError(answer)
            case "run":
                raise RetrainError(answer)
            case "memory":
                raise RetrainError(
                    f"out of memory in sampling on {self._device}: lower training.batch_size, group_size or max_tokens"
                )
            case "unexpected":
                reason = answer.strip().splitlines()[-1]
                raise RetrainError(f"sampling on {self._device} failed: {reason}") from RuntimeError(answer)
        return answer

    def _ending(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        status = self._process.returncode
        return "it does not answer" if status is None else f"{'signal' if status < 0 else 'exit status'} {abs(status)}"

    def close(self) -> None:
        """What is being sampled is given up."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
