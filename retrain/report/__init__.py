"""`retrain report`: one self-contained page about a run, a folder of runs or a campaign. Torch-free.

The page needs no network and allows none: its own Content-Security-Policy forbids everything but the style and the
script in it. Python computes what is shown, the script only draws. Everything written by a model, a data set or a user
is data there, never markup. A page stays below `MOST_BYTES`, whatever the runs hold.
"""

from __future__ import annotations

import os
from pathlib import Path

from retrain.report.gather import gather
from retrain.report.page import MOST_BYTES, render
from retrain.types import ConfigError, RetrainError

__all__ = ["MOST_BYTES", "write_report"]


def write_report(folder: Path, out: Path) -> Path:
    """Write the page about `folder` to `out`, whole or not at all, and return `out`.

    Raises ConfigError where there is no run in `folder` or `out` cannot be written, RetrainError where the records of
    every run are damaged.
    """
    page = render(gather(folder)).encode()
    if len(page) > MOST_BYTES:
        raise RetrainError(f"{folder}: its page would have {len(page):,} bytes, more than {MOST_BYTES:,}; report parts")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_bytes(page)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"report: {out} cannot be written: {error.strerror}. Give another file with -o") from None
    return out
