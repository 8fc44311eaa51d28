"""Making the operating system fail, or the process die, at any one of the calls that a write consists of."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

CALLS = ((os, "fsync"), (os, "open"), (Path, "open"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"))


class Fault:
    """While active, call number `at` (from 0) of those in CALLS does `act` first. fired: whether it came to it."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.left, self.act, self.fired = at, act, False

    @contextmanager
    def active(self) -> Iterator[Fault]:
        patches = [patch.object(owner, name, self._wrap(getattr(owner, name))) for owner, name in CALLS]
        for each in patches:
            each.start()
        try:
            yield self
        finally:
            for each in patches:
                each.stop()

    def _wrap(self, call: Callable) -> Callable:
        def wrapped(*arguments, **keywords):
            self.left -= 1
            if self.left == -1:
                self.fired = True
                self.act()
            return call(*arguments, **keywords)

        return wrapped


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_everywhere(work: Callable[[int], None]) -> Iterator[int]:
    """Run work(n) with its n-th call failing, for n = 0, 1, ... until it needs fewer; yields after each failure."""
    for at in range(1000):
        with Fault(at, no_space).active() as fault:
            try:
                work(at)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        if not fault.fired:
            return
        yield at
    raise AssertionError("it never comes to an end")


def dying_everywhere(work: Callable[[int], None]) -> Iterator[int]:
    """Run work(n) in a process that ends at its n-th call, as with kill -9, for n = 0, 1, ... until it needs fewer."""
    for at in range(1000):
        child = os.fork()
        if child == 0:
            with Fault(at, lambda: os._exit(9)).active():
                work(at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return
        yield at
    raise AssertionError("it never comes to an end")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of `size` ("64k") at `folder`. Skips the test where this process may not mount one."""
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("mounting a small disk takes `mount`")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this process may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
