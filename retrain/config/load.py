"""TOML files to Config and back."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from retrain.config.build import build
from retrain.config.campaign import run_matrix
from retrain.config.schema import Config
from retrain.config.suggest import did_you_mean
from retrain.types import ConfigError

DEFAULT_PATH = "retrain.toml"
HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]")
TOML_POSITION = re.compile(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The resolved configuration of a TOML file, with `overrides` ({"section.key": value}) winning over it.

    Raises ConfigError that names the file, the line where it is known, and what to write instead.
    """
    text = _read(Path(path))
    data = _parse(text, str(path))

    def place(section: str, key: str) -> str:
        line = find_line(text, section, key)
        return f"{path}:{line}: " if line else f"{path}: "

    if overrides and "campaign" in data and "training.max_steps" in overrides:
        # A flag wins over the file, also over the steps that the file gives its campaign.
        overrides = {"campaign.max_steps": overrides["training.max_steps"], **overrides}
    config = build(data, overrides, place)
    run_matrix(config)  # a condition that does not resolve is an error of the file
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """{section: {key: value}} of plain values, by the names of the TOML file; absent optional sections are left out."""
    return config.model_dump(mode="json", by_alias=True, exclude_none=True)


def dump_toml(config: Config) -> str:
    """TOML text of the resolved configuration; it loads back to an equal Config."""
    return tomli_w.dumps(to_dict(config))


def find_line(text: str, section: str, key: str = "") -> int | None:
    """The line, from 1, on which `key` of `section` (or the section itself) is written; None where not found.

    A scan of headers and assignments, good for pointing a reader to the place.
    """
    assignment = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""")
    dotted = re.compile(rf"\s*{re.escape(section)}\s*\.\s*{re.escape(key)}\s*=")
    current = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = HEADER.match(line)
        if header:
            current = header[1].strip("\"'")
            if current == (f"{section}.{key}" if key and section else section or key) and current:
                return number
        elif (key and current == section and assignment.match(line)) or (not current and dotted.match(line)):
            return number
    return None


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a TOML file") from None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {exc.start}); save it as UTF-8") from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from None


def _missing(path: Path) -> str:
    folder = path.parent
    present = sorted(file.name for file in folder.glob("*.toml")) if folder.is_dir() else []
    hint = did_you_mean(path.name, present)
    if str(path) == DEFAULT_PATH:
        return f"no {DEFAULT_PATH} here{hint or '; give the path of a config, or write one with `retrain init`'}"
    return f"{path}: no such file{hint or '; write one with `retrain init`'}"


def _parse(text: str, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: TOML syntax: nested too deeply") from None
    except ValueError as exc:  # TOMLDecodeError, and what int() says of a number of thousands of digits
        position = TOML_POSITION.match(str(exc))
        if position is None:
            raise ConfigError(f"{path}: TOML syntax: {exc}") from None
        reason, line, column = position.groups()
        if line is None:  # tomllib says only "at end of document"
            lines = text.split("\n")
            line, column = len(lines), len(lines[-1]) + 1
        raise ConfigError(f"{path}:{line}:{column}: TOML syntax: {reason}") from None
