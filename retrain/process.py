"""How a child process ends with its parent. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Bind this process to the life of the one that holds the other end of its stdin.

    However that one dies, the kernel closes the pipe, and this process and its group end at once. Must be called in the
    main thread of a process that leads its own group.
    """
    if sys.platform == "linux":
        # The kernel needs nobody's help, not even that of an interpreter whose lock is held by a long C call.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_end, name="end with parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
