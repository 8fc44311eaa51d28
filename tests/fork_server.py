"""Runs the command in forks of a process that has imported everything: `python tests/fork_server.py`.

The interpreter's start and the imports, several seconds of each run, are then paid once. A request is a line of JSON
on stdin: arguments, folder, environment, the files that take stdout and stderr; the answers are the process id and,
when it has ended, its exit status. `main` is entered as `python -m retrain` does, and the process ends as that one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

import peft  # noqa: F401
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import retrain.cli.eval
import retrain.cli.train
import retrain.training.run  # noqa: F401
from retrain.cli import main


def serve() -> None:
    """Until stdin ends. Leaves only in a fork, with what that is asked to run in sys.argv."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def become(request: dict) -> None:
    """The process that `request` describes."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.argv[1:] = request["arguments"]
    # As `python -m` begins it: the folder it is started in, and PYTHONPATH, in place of this file's own folder.
    sys.path[:1] = [request["folder"], *filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
    sys.exit(main())
