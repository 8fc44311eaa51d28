"""`[squeeze]` in a campaign: the adapter of the first finished run, analysed beside the runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from retrain.campaign.schedule import Job
from retrain.config import KEYS, changed
from retrain.config.campaign import SQUEEZE_OF_RUNS
from retrain.training.folder import FINAL
from retrain.types import RetrainError

if TYPE_CHECKING:
    from retrain.config import Config

NAME = "squeeze"
ANALYSIS = "squeeze.json"
LOG = "squeeze.log"
# What the campaign says itself, and what is a run's matter.
NOT_PASSED = ("squeeze.adapter_path", *(f"squeeze.{key}" for key in SQUEEZE_OF_RUNS))
WANDB_NAME = "squeeze-analysis"


def job(config: Config, folder: Path, log_dir: Path) -> Job:
    """`retrain squeeze` on the final adapter of the run in `log_dir`, its answer going to squeeze.json."""
    for name in (ANALYSIS, LOG):
        (folder / name).unlink(missing_ok=True)
    arguments = ["squeeze", str(log_dir / FINAL), "--json", *flags(config)]
    return Job(NAME, lambda device: arguments, folder / ANALYSIS, folder / LOG)


def flags(config: Config) -> list[str]:
    """`[squeeze]` of the campaign as flags."""
    values = {path: value for path, value in changed(config).items() if KEYS[path].section == "squeeze"}
    return [f"--{path}={_text(value)}" for path, value in values.items() if path not in NOT_PASSED]


def _text(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(map(str, value))
    return str(value)


def read(folder: Path) -> dict[str, Any]:
    """What the analysis printed. Raises ValueError where that is nothing whole."""
    return json.loads((folder / ANALYSIS).read_bytes())


def log_to_wandb(config: Config, folder: Path, analysis: dict[str, Any]) -> None:
    """A run of its own beside the campaign's: a step for each rank. Raises RetrainError where wandb does not start."""
    import wandb

    logging = config.logging
    try:
        run = wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity or None,
            name=WANDB_NAME,
            reinit="create_new",
            dir=str(folder),
            settings=wandb.Settings(console="off"),
        )
    except (wandb.Error, ValueError, OSError) as error:
        raise RetrainError(f"wandb did not take the squeeze analysis: {error}") from error
    for rank in analysis["ranks"]:
        values = {name: analysis[name][str(rank)] for name in ("mean_variance", "min_variance")}
        run.log({f"squeeze/{name}": value for name, value in values.items()}, step=rank)
    run.summary["recommended_rank"] = analysis["recommended_rank"]
    run.finish()


def table(analysis: dict[str, Any], run: str) -> Table:
    """What each rank would keep of the adapter of `run`."""
    found = Table(box=None, header_style="bold", pad_edge=False, title=f"squeeze of {run}", title_justify="left")
    for name in ("rank", "variance, mean", "smallest", "layer of the smallest"):
        found.add_column(name, justify="left" if name.startswith("layer") else "right")
    for rank in map(str, analysis["ranks"]):
        mark = " (recommended)" if rank == str(analysis["recommended_rank"]) else ""
        mean, least = analysis["mean_variance"][rank], analysis["min_variance"][rank]
        found.add_row(rank, f"{mean:.2%}", f"{least:.2%}", Text(analysis["worst_layer"][rank] + mark))
    return found
