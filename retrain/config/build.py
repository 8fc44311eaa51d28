"""From plain tables to a Config: unknown names, wrong types, ranges and combinations, each said in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from retrain.config import checks
from retrain.config.schema import ARRAYS, KEYS, SECTIONS, Config, key_at, keys_of
from retrain.config.show import show
from retrain.config.suggest import did_you_mean, nearest
from retrain.types import ConfigError

# (section, key or "") -> "file:line: " of where it was written, "" where it does not come from a file.
Place = Callable[[str, str], str]

EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def build(
    data: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, place: Place = lambda section, key: ""
) -> Config:
    """The Config of `data` ({section: {key: value}}) with `overrides` ({"section.key": value}) on top.

    Raises ConfigError with one line for each thing that is wrong.
    """
    overrides = overrides or {}
    written = _written_place(place, overrides)
    _refuse([*unknown_names(data, written), *unknown_paths(overrides)])
    merged = {section: dict(table) for section, table in data.items()}
    for path, value in overrides.items():
        section, _, name = path.partition(".")
        merged.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(merged)
    except ValidationError as exc:
        raise ConfigError("\n".join(_describe_all(exc, written))) from None
    _refuse(place("", "") + problem for problem in (*checks.problems(config), *checks.leaks(config)))
    return config


def unknown_names(data: Mapping[str, Any], place: Place) -> list[str]:
    """A line for each section or key of `data` that the schema does not have, with the nearest that it has."""
    lines = []
    for section, table in data.items():
        if section not in SECTIONS:
            written = place(section, "") if isinstance(table, Mapping) else place("", section)
            lines.append(written + _unknown_section(section, table))
        elif not isinstance(table, Mapping):
            lines.append(f"{place('', section)}{section} = {show(table)}: must be a section, written as [{section}]")
        else:
            unknown = [name for name in table if f"{section}.{name}" not in KEYS]
            lines.extend(place(section, name) + _unknown_key(section, name) for name in unknown)
    return lines


def unknown_paths(overrides: Iterable[str]) -> list[str]:
    """A line for each "section.key" that the schema does not have."""
    return [_unknown_path(path) for path in overrides if path not in KEYS]


def _unknown_path(path: str) -> str:
    section, _, name = path.partition(".")
    if section in SECTIONS and name:
        return _unknown_key(section, name)
    owners = [key.path for key in KEYS.values() if key.name == path]
    return (
        f"{path}: unknown key; write {' or '.join(owners)}"
        if owners
        else (f"{path}: unknown key{did_you_mean(path, KEYS)}")
    )


def _unknown_section(section: str, table: object) -> str:
    if not isinstance(table, Mapping):
        owners = [key.section for key in KEYS.values() if key.name == section]
        if owners:
            return f"{section} = {show(table)}: stands outside any section; it belongs in {_sections(owners)}"
        return f"{section} = {show(table)}: unknown key{did_you_mean(section, KEYS)}"
    return f"[{section}]: unknown section{did_you_mean(section, SECTIONS, '[{}]')}"


def _unknown_key(section: str, name: str) -> str:
    owners = [key.section for key in KEYS.values() if key.name == name]
    near = nearest(name, keys_of(section))
    if near and owners:
        hint = f'; did you mean "{near}", or {name} in {_sections(owners)}?'
    elif near:
        hint = f'; did you mean "{near}"?'
    elif owners:
        hint = f"; it belongs in {_sections(owners)}"
    else:
        by_name = {key.name: key for key in KEYS.values()}
        far = nearest(name, by_name)
        hint = f"; did you mean {by_name[far].path}?" if far else f"; [{section}] has {', '.join(keys_of(section))}"
    return f"{section}.{name}: unknown key{hint}"


def _sections(names: Iterable[str]) -> str:
    return " or ".join(f"[{name}]" for name in names)


def _written_place(place: Place, overrides: Mapping[str, Any]) -> Place:
    """An overridden value was not written in the file, so no line of the file is to blame."""
    return lambda section, key: "" if f"{section}.{key}" in overrides else place(section, key)


def _refuse(lines: Iterable[str]) -> None:
    text = "\n".join(lines)
    if text:
        raise ConfigError(text)


def _describe_all(exc: ValidationError, place: Place) -> list[str]:
    errors = [error for error in exc.errors() if error["type"] != "default_factory_not_called"]
    return [place(*_section_and_key(error["loc"])) + _describe(error) for error in errors]


def _section_and_key(location: tuple[Any, ...]) -> tuple[str, str]:
    return str(location[0]), str(location[1]) if len(location) > 1 else ""


def _label(location: tuple[Any, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _describe(error: Any) -> str:
    """One line about a pydantic error: where, the value, what it must be."""
    location, kind, value = error["loc"], error["type"], error["input"]
    if kind == "extra_forbidden":  # only within an array of tables: other names are checked before
        known = ARRAYS[".".join(_section_and_key(location))].model_fields
        return f"{_label(location)}: unknown key{did_you_mean(str(location[-1]), known)}"
    return f"{_label(location)} = {show(value)}: {_expectation(kind, value, error)}"


def _expectation(kind: str, value: object, error: Any) -> str:
    key = key_at(error["loc"])
    if kind == "literal_error":
        names = [name or '""' for name in key.choices]
        hint = did_you_mean(value, filter(None, key.choices)) if isinstance(value, str) else ""
        return f"must be one of {', '.join(names)}{hint}"
    if kind in OUT_OF_RANGE:
        return f"out of range, must be {key.range}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "finite_number":
        return "must be a finite number"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind in EXPECTED:
        return f"must be {EXPECTED[kind]}{_quoting_hint(kind, value)}"
    return error["msg"]


def _quoting_hint(kind: str, value: object) -> str:
    if kind == "string_type" and isinstance(value, int | float):
        return f', in quotes: "{show(value)}"'
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type") and _is_bare(kind, value):
        return f"; write {value} without quotes"
    return ""


def _is_bare(kind: str, value: str) -> bool:
    if kind == "bool_type":
        return value in ("true", "false")
    try:
        int(value) if kind == "int_type" else float(value)
    except ValueError:
        return False
    return True
