r"""Known sets of word problems: `math` (hendrycks MATH, arXiv 2103.03874) and `gsm8k` (arXiv 2110.14168).

From the hub, or from a folder that mirrors it (`math:FOLDER`): the same rows, read by the same recipe. Both ask for
the answer in a box, because that is where the rewards look for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from retrain.boxed import last_box
from retrain.data import files, hub
from retrain.data.records import Recipe, Row
from retrain.types import ConfigError

BOX_INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def final_number(solution: str) -> str | None:
    """What stands after the last "####" of a GSM8K solution, thousands commas removed; None where nothing does."""
    _, mark, answer = solution.rpartition("####")
    return re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip()) or None if mark else None


@dataclass(frozen=True)
class ProblemSet:
    """Where a set lies, and how a row of it becomes an example.

    parts: its configurations on the hub, each with rows of its own. files: patterns of a part's files in a folder, the
    first that matches any counts; a pattern without {split} holds the split `train` alone.
    """

    hub: str
    parts: tuple[str, ...]
    files: tuple[str, ...]
    recipe: Recipe


SETS = {
    "math": ProblemSet(
        hub="EleutherAI/hendrycks_math",
        parts=("intermediate_algebra", "precalculus", "number_theory", "counting_and_probability", "geometry"),
        files=("{part}.jsonl", "{part}/{split}.jsonl", "{part}/{split}-*.parquet"),
        recipe=Recipe("problem", "solution", "{problem}" + BOX_INSTRUCTION, find=last_box, missing="\\boxed{} answer"),
    ),
    "gsm8k": ProblemSet(
        hub="openai/gsm8k",
        parts=("main",),
        files=("{split}.jsonl", "{part}/{split}.jsonl", "{part}/{split}-*.parquet"),
        recipe=Recipe("question", "answer", "{question}" + BOX_INSTRUCTION, find=final_number, missing="#### answer"),
    ),
}


def recipe(name: str, prompt_template: str) -> Recipe:
    """How a row of the set becomes an example; a template of the user's goes before the set's own."""
    own = SETS[name].recipe
    return replace(own, prompt_template=prompt_template or own.prompt_template)


def read_rows(source: str, split: str) -> Iterator[Row]:
    """The rows of `math`, `gsm8k`, `math:FOLDER` or `gsm8k:FOLDER`, part by part.

    split: as `datasets` has it; of a folder, "train", "test" or both joined with a plus.
    Raises ConfigError where the hub cannot be reached, or the folder lacks a part.
    """
    name, _, folder = source.partition(":")
    known = SETS[name]
    for part in known.parts:
        if folder:
            for path in _files(source, Path(folder).expanduser(), known, part, split):
                yield from files.read_rows(path)
        else:
            instead = f'Or copy its files to a folder and set data.source = "{name}:FOLDER"'
            yield from hub.read_rows(source, known.hub, part, split, instead=instead)


def _files(source: str, folder: Path, known: ProblemSet, part: str, split: str) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f'data.source = "{source}": no such folder')
    found = []
    for name in split.split("+"):
        patterns = [pattern.format(part=part, split=name) for pattern in known.files]
        matches = (sorted(folder.glob(pattern)) for pattern in patterns)
        at = next(((i, paths) for i, paths in enumerate(matches) if paths), None)
        if at is None:
            raise ConfigError(
                f'data.source = "{source}", data.split = "{split}": the folder has none of {", ".join(patterns)}'
            )
        which, paths = at
        if "{split}" not in known.files[which] and split != "train":
            raise ConfigError(
                f'data.split = "{split}": {paths[0]} is not divided into splits; remove data.split to use all of it'
            )
        found += paths
    return found
