"""`retrain planning TEXT-or-FILE` shows which tokens plan; `retrain planning mine LOG_DIR` finds phrases that do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrain import planning
from retrain.assets import resolve_model
from retrain.cli.flags import Parsed, parse
from retrain.config import Config, ModelConfig, load_config
from retrain.config.build import build
from retrain.planning.encoder import open_encoder
from retrain.planning.mine import Cluster, mine
from retrain.planning.offsets import TokenOffsets
from retrain.planning.semantic import planning_scores
from retrain.planning.windows import windows
from retrain.redact import shown
from retrain.training.folder import CONFIG, GENERATIONS
from retrain.training.metrics import CORRECT
from retrain.training.records import rows
from retrain.types import ConfigError

SHOWN = 20
LONGEST_NAME = 200
MEMBERS_SHOWN = 3


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "planning")
    given = list(parsed.positionals)
    if not given:
        raise ConfigError('planning: give a text or a file: retrain planning "Wait, let me check that."')
    if given[0] == "mine":
        return _mine(parsed)
    if len(given) > 1:
        raise ConfigError(f'"{given[1]}": one argument too many; put the text in quotes')
    if parsed.options["top"]:
        raise ConfigError("--top: only `retrain planning mine` takes it")
    text = _read(given[0])
    facts = show(_config(parsed, None), text)
    if parsed.options["json"]:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(facts, text)
    return 0


def show(config: Config, text: str) -> dict[str, Any]:
    """Which tokens of a text plan, as the config's tokenizer cuts it and its detector decides."""
    section = config.planning
    tokenizer = _tokenizer(config.model)
    detector = planning.open_detector(
        section.detector,
        tokenizer,
        grams=config.logging.strategic_grams,
        model=section.model,
        threshold=section.threshold,
    )
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    offsets = TokenOffsets(tokenizer)
    decoded = offsets.text(ids.tolist())
    mask, spans = detector([ids])[0].tolist(), offsets.spans(ids.tolist(), decoded).tolist()
    facts: dict[str, Any] = {
        "detector": section.detector,
        "tokenizer": config.model.model,
        "text": decoded,
        "planning": sum(mask),
        "tokens": [
            {"id": int(i), "start": a, "end": b, "text": decoded[a:b], "planning": plans}
            for i, (a, b), plans in zip(ids, spans, mask, strict=True)
        ],
    }
    if section.detector == "semantic":
        found = windows(decoded)
        scores = planning_scores(open_encoder(section.model))([decoded[a:b] for a, b in found])
        facts["threshold"] = section.threshold
        facts["windows"] = [
            {"start": a, "end": b, "text": decoded[a:b], "score": score}
            for (a, b), score in zip(found, scores, strict=True)
        ]
    return facts


def _config(parsed: Parsed, default: Path | None) -> Config:
    """The config of --config; else the file `default`; else the defaults, with the embedded model's tokenizer."""
    path = parsed.options["config"] or default
    return (
        load_config(path, parsed.overrides) if path else build({}, {"model.model": "builtin:tiny"} | parsed.overrides)
    )


def _read(given: str) -> str:
    """The text itself, or what the file it names holds. One word like a path is a file: a missing one is an error."""
    path = Path(given)
    like_a_path = len(given.split()) == 1 and (path.suffix or "/" in given)
    if like_a_path or (len(given) < LONGEST_NAME and path.is_file()):
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{given}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{given}: cannot be read: {error.strerror}") from None
    return given


def _tokenizer(model: ModelConfig) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(resolve_model(model.model), trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f'model.model = "{model.model}": its tokenizer cannot be loaded: {reason}') from error


def _print(facts: dict[str, Any], text: str) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    marked = Text()
    for part, plans in _parts(facts):
        if console.is_terminal:
            marked.append(shown(part), style="bold black on yellow" if plans else "")
        else:
            marked.append(f"[{shown(part)}]" if plans else shown(part))
    console.print(marked)
    total = len(facts["tokens"])
    print(f"\n{facts['planning']} of {total} tokens plan; detector {facts['detector']}, tokenizer {facts['tokenizer']}")
    if facts["text"] != text:
        print("the tokenizer does not give this text back as it was: shown is what it decodes to")
    if "windows" in facts:
        print(f"\nscore of each window (planning above {facts['threshold']})")
        for window in facts["windows"]:
            console.print(f"{window['score']:+.3f}  {' '.join(window['text'].split())}")


def _parts(facts: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """The text in order, cut where planning begins and ends. A character of several tokens plans if one does."""
    plans = np.zeros(len(facts["text"]), dtype=bool)
    for token in facts["tokens"]:
        plans[token["start"] : token["end"]] |= token["planning"]
    for planning_run, chars in groupby(zip(plans.tolist(), facts["text"], strict=True), key=lambda pair: pair[0]):
        yield "".join(char for _, char in chars), planning_run


def _mine(parsed: Parsed) -> int:
    if len(parsed.positionals) != 2:
        raise ConfigError("planning mine: give the folder of one run: retrain planning mine logs/quickstart")
    log_dir = Path(parsed.positionals[1])
    if not (log_dir / GENERATIONS).is_file():
        raise ConfigError(f"planning mine: {log_dir}: there is no run with a {GENERATIONS} in that folder")
    top = _top(parsed.options["top"])
    config = _config(parsed, log_dir / CONFIG if (log_dir / CONFIG).is_file() else None)
    generations = list(rows(log_dir / GENERATIONS))
    solved = [row["completion"] for row in generations if (row["reward"] or 0.0) > CORRECT]
    if not solved:
        raise ConfigError(
            f"planning mine: none of the {len(generations)} completions in {log_dir} has a reward above {CORRECT}"
        )
    from transformers.utils import logging

    logging.disable_progress_bar()
    clusters = mine(solved, open_encoder(config.planning.model))[:top]
    line = tomli_w.dumps({"strategic_grams": ", ".join(cluster.gram for cluster in clusters)})
    if parsed.options["json"]:
        facts = {"completions": len(solved), "different": len(set(solved)), "clusters": [asdict(c) for c in clusters]}
        print(json.dumps(facts | {"toml": line.strip()}, indent=2, ensure_ascii=False))
        return 0
    print(f"{len(solved)} of {len(generations)} completions solved, {len(set(solved))} of them different\n")
    Console(width=None if sys.stdout.isatty() else 160).print(_table(clusters))
    print(f"\nfor the config, after striking out what does not plan:\n\n[logging]\n{line}", end="")
    return 0


def _top(text: str | None) -> int:
    if text is None:
        return SHOWN
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--top {text}: must be an integer of 1 or more")
    return int(text)


def _table(clusters: list[Cluster]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("completions", justify="right")
    table.add_column("phrase")
    table.add_column("with")
    for cluster in clusters:
        others = cluster.members[1 : 1 + MEMBERS_SHOWN]
        more = len(cluster.members) - 1 - len(others)
        table.add_row(
            str(cluster.documents), Text(cluster.gram), Text(", ".join(others) + (f" and {more} more" if more else ""))
        )
    return table
