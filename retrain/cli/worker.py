"""`python -m retrain.cli.worker`: the command line, bound to the life of the process that holds its stdin's other end.

However that one dies, the kernel closes the pipe, and this process and its group end at once: a run can go on from its
checkpoint, an orphan would write to a folder that somebody else continues.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

from retrain.cli import main

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Must be called in the main thread of a process that leads its own group."""
    if sys.platform == "linux":
        # The kernel needs nobody's help, not even that of an interpreter whose lock is held by a long C call.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_end, name="end with parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
