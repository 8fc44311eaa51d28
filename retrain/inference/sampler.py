"""`python -m retrain.inference.sampler`: the process that samples where training has a device of its own.

It holds the base and the adapter it was last sent, and answers one request after the other over a pipe to
`retrain.inference.split`. It ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from retrain.backend import snapshot
from retrain.backend.devices import is_out_of_memory, resolve_devices
from retrain.backend.model import load_policy
from retrain.config import Config
from retrain.inference.pytorch import PyTorchEngine
from retrain.process import end_with_parent
from retrain.types import ConfigError, RetrainError


def main() -> None:
    end_with_parent()
    connection = Connection(int(sys.argv[1]))
    sampler = _Sampler()
    with suppress(EOFError):
        while True:
            request, *arguments = connection.recv()
            connection.send(_answer(getattr(sampler, request), arguments))


def _answer(work: Callable[..., Any], arguments: list[Any]) -> tuple[str, Any]:
    """("done", result), or the kind of an error and its message."""
    try:
        return "done", work(*arguments)
    except ConfigError as error:
        return "config", str(error)
    except RetrainError as error:
        return "run", str(error)
    except Exception as error:  # noqa: BLE001 - the other process raises it again, and says where it came from
        return ("memory", str(error)) if is_out_of_memory(error) else ("unexpected", traceback.format_exc())


class _Sampler:
    """The requests. Nothing else may be asked before `open`."""

    def open(self, config: Config) -> tuple[str, list[str]]:
        """Load the model. How it is decoded, in one line, and what there is to say."""
        said: list[str] = []
        device, _, processes = resolve_devices(config.backend, said.append)
        # A fresh adapter changes nothing, whatever it was drawn from.
        self.policy = load_policy(
            config.model, config.lora, config.training, device, lora_seed=0, say=said.append, processes=processes
        )
        self.engine = PyTorchEngine.of(self.policy, config.inference)
        return self.engine.path, said

    def use(self, version: int, taken: bytes) -> None:
        snapshot.put(self.policy, taken)
        self.engine.use(version)

    def generate(self, prompts: Any, streams_PG: Any, max_tokens: int, temperature: float) -> Any:
        return self.engine.generate(prompts, streams_PG, max_tokens=max_tokens, temperature=temperature)


if __name__ == "__main__":
    main()
