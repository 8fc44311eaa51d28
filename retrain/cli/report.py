"""`retrain report LOG_DIR`: one self-contained page about a run, a folder of runs or a campaign."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrain.cli.flags import parse
from retrain.report import write_report
from retrain.types import ConfigError

DEFAULT_NAME = "report.html"


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "report")
    if not parsed.positionals:
        raise ConfigError("report: give the folder of a run or of a campaign: retrain report logs/train")
    folder = Path(parsed.positionals[0])
    out = write_report(folder, Path(parsed.options["o"] or folder / DEFAULT_NAME))
    print(out)
    return 0
