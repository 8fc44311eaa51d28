"""The types of configuration values that need more than a Python type: names or plug-ins, devices, sources, lists."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import core_schema

from retrain.config.suggest import did_you_mean

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
DEVICE = re.compile(r"(cpu|mps|(gpu|cuda)(:\d+)?)")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
CONDITION_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
PART_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
ENVIRONMENT_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(@[\w.+-]+)?", re.ASCII)
RESERVED_PARTS = ("errors", "parts", "time_s")
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BUILTIN_SOURCES = ("math", "gsm8k", "arithmetic", "arithmetic:words")
PROBLEM_SETS = ("math", "gsm8k")
REASONING_GYM = "reasoning_gym:"

SourceKind = Literal["arithmetic", "problem_set", "reasoning_gym", "file", "hub", "dotted"]


@dataclass(frozen=True)
class NameOrPlugin:
    """Marks a string that is one of `names` or the dotted path of a plug-in function."""

    names: tuple[str, ...]

    def check(self, value: str) -> str:
        if value in self.names or DOTTED.fullmatch(value):
            return value
        hint = did_you_mean(value, self.names)
        raise ValueError(f"must be one of {', '.join(self.names)} or a dotted path pkg.mod.fn{hint}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(self.names)}, {"type": "string", "pattern": f"^{DOTTED.pattern}$"}]}


def source_kind(source: str) -> SourceKind | None:
    """What a `data.source` names, or None when it names nothing that exists.

    A suffix decides before the dots do: "train.jsonl" is a file, "pkg.train" a dotted path, "org/name" a hub id. What
    follows "math:" and "gsm8k:" is a folder.
    """
    name, _, folder = source.partition(":")
    if source in PROBLEM_SETS or (name in PROBLEM_SETS and folder):
        return "problem_set"
    if source in BUILTIN_SOURCES:
        return "arithmetic"
    if source.startswith(REASONING_GYM) and len(source) > len(REASONING_GYM):
        return "reasoning_gym"
    if source.endswith(FILE_SUFFIXES):
        return "file"
    if DOTTED.fullmatch(source):
        return "dotted"
    return "hub" if HUB_ID.fullmatch(source) else None


def _check_source(value: str) -> str:
    if source_kind(value) is None:
        known = f"{', '.join(BUILTIN_SOURCES)}, math:FOLDER, gsm8k:FOLDER, {REASONING_GYM}TASK"
        raise ValueError(
            f"must be one of {known}, a file ({', '.join(FILE_SUFFIXES)}), a hub id org/name "
            f"or a dotted path pkg.mod.fn{did_you_mean(value, BUILTIN_SOURCES)}"
        )
    return value


def _check_devices(value: str) -> str:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if not DEVICE.fullmatch(name):
            known = ("cpu", "mps", "gpu:0", "cuda:0")
            raise ValueError(f"{json.dumps(name)} is no device; write {', '.join(known)}{did_you_mean(name, known)}")
    return ",".join(names)


def _check_condition_name(value: str) -> str:
    if value and not CONDITION_NAME.fullmatch(value):
        raise ValueError("names a folder: use letters, digits and . _ + - and start with a letter or digit")
    return value


def _check_environment_id(value: str) -> str:
    if value and not ENVIRONMENT_ID.fullmatch(value):
        raise ValueError('names a package: write owner/name or owner/name@version, as in "primeintellect/gsm8k"')
    return value


def _check_part_name(value: str) -> str:
    if value in RESERVED_PARTS:
        raise ValueError(f"reward_{value} is a figure of its own in metrics.jsonl; give another name")
    if value and not PART_NAME.fullmatch(value):
        raise ValueError("ends the name of a metric: use letters, digits and _ and start with a letter")
    return value


def _check_target_modules(value: object) -> str | tuple[str, ...]:
    match value:
        case "all-linear":
            return "all-linear"
        case str():
            raise ValueError(f'must be "all-linear" or a list of module names, as in [{json.dumps(value)}]')
        case list() | tuple() if value and all(isinstance(name, str) and name for name in value):
            return tuple(value)
    raise ValueError('must be "all-linear" or a non-empty list of module names')


def _parse_table(value: object) -> object:
    """A TOML table as it is; a JSON string is read as an object. Only what TOML and JSON share is accepted."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}", parse_constant=_refuse_constant)
        except json.JSONDecodeError as exc:
            raise ValueError(f"is not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a table, or a JSON string that holds an object")
    _check_plain(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is not a number that JSON allows")


def _check_plain(value: object) -> None:
    match value:
        case dict():
            for inner in value.values():
                _check_plain(inner)
        case list():
            for inner in value:
                _check_plain(inner)
        case float() if value != value or abs(value) == float("inf"):
            raise ValueError("holds a number that is not finite")
        case str() | bool() | int() | float():
            pass
        case _:
            raise ValueError(f"holds {value!r}: only strings, numbers, booleans, lists and tables are possible")


def _flatten(value: object) -> object:
    """{"training": {"lr": 1}} and {"training.lr": 1} both become {"training.lr": 1}: TOML users write either."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict) and "." not in name:
            flat.update({f"{name}.{key}": leaf for key, leaf in inner.items()})
        else:
            flat[name] = inner
    return flat


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


AdvantageMode = Annotated[str, NameOrPlugin(("grpo", "dr_grpo", "rloo", "reinforce_pp", "maxrl"))]
TransformMode = Annotated[str, NameOrPlugin(("none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_hicra"))]
Devices = Annotated[str, AfterValidator(_check_devices)]
Source = Annotated[str, AfterValidator(_check_source)]
ConditionName = Annotated[str, AfterValidator(_check_condition_name)]
EnvironmentId = Annotated[str, AfterValidator(_check_environment_id)]
PartName = Annotated[str, AfterValidator(_check_part_name)]
TargetModules = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_check_target_modules),
    WithJsonSchema({"anyOf": [{"const": "all-linear"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Table = Annotated[dict[str, Any], BeforeValidator(_parse_table)]
Overrides = Annotated[dict[str, Any], BeforeValidator(_flatten)]

# A TOML array is kept as a tuple, so that a section stays frozen.
from_array = BeforeValidator(_as_tuple)
IntList = Annotated[tuple[int, ...], from_array]
