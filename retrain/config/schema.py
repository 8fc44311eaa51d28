"""The configuration as a whole, and the flat list of its keys that flags, help, explain and documentation go by."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from retrain.config import sections as s
from retrain.config.fields import NameOrPlugin
from retrain.config.rewards import RewardPart

JSON_SCHEMA_DIALECT = "http://json-schema.org/draft-07/schema#"


class Config(BaseModel):
    """A resolved configuration: one frozen object a section; `squeeze` and `campaign` are None where absent."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", revalidate_instances="never")

    backend: s.BackendConfig = Field(default_factory=s.BackendConfig)
    model: s.ModelConfig = Field(default_factory=s.ModelConfig)
    algorithm: s.AlgorithmConfig = Field(default_factory=s.AlgorithmConfig)
    loss: s.LossConfig = Field(default_factory=s.LossConfig)
    training: s.TrainingConfig = Field(default_factory=s.TrainingConfig)
    optimizer: s.OptimizerConfig = Field(default_factory=s.OptimizerConfig)
    lora: s.LoraConfig = Field(default_factory=s.LoraConfig)
    data: s.DataConfig = Field(default_factory=s.DataConfig)
    eval: s.EvalConfig = Field(default_factory=s.EvalConfig)
    environment: s.EnvironmentConfig = Field(default_factory=s.EnvironmentConfig)
    planning: s.PlanningConfig = Field(default_factory=s.PlanningConfig)
    gtpo: s.GtpoConfig = Field(default_factory=s.GtpoConfig)
    hicra: s.HicraConfig = Field(default_factory=s.HicraConfig)
    sepa: s.SepaConfig = Field(default_factory=s.SepaConfig)
    inference: s.InferenceConfig = Field(default_factory=s.InferenceConfig)
    reward: s.RewardConfig = Field(default_factory=s.RewardConfig)
    backpressure: s.BackpressureConfig = Field(default_factory=s.BackpressureConfig)
    squeeze: s.SqueezeConfig | None = None
    resume: s.ResumeConfig = Field(default_factory=s.ResumeConfig)
    logging: s.LoggingConfig = Field(default_factory=s.LoggingConfig)
    campaign: s.CampaignConfig | None = None


@dataclass(frozen=True)
class Key:
    """One key of the configuration, as users see it."""

    section: str
    field: FieldInfo
    attribute: str
    default: Any

    @property
    def name(self) -> str:
        """Its name in TOML: `from` is spelt `from_` only in Python."""
        return self.field.alias or self.attribute

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def description(self) -> str:
        return self.field.description or ""

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The names that are possible, () where any value of the type is."""
        if get_origin(self.field.annotation) is Literal:
            return get_args(self.field.annotation)
        return next((mark.names for mark in self.field.metadata if isinstance(mark, NameOrPlugin)), ())

    @cached_property
    def type(self) -> str:
        """bool, int, float, str, list[int], `str / list[str]`, `table / str` or list[table]."""
        annotation = self.field.annotation
        if annotation in (bool, int, float, str):
            return annotation.__name__
        if get_origin(annotation) is Literal:
            return "str"
        if get_origin(annotation) in (Union, types.UnionType):
            return "str / list[str]"
        if get_origin(annotation) is dict:
            return "table / str"
        return "list[int]" if get_args(annotation)[0] is int else "list[table]"

    @cached_property
    def range(self) -> str:
        """The range in words, such as ">= 1" or "0 <= x < 1"; '' where there is none."""
        marks = {type(mark): mark for mark in self.field.metadata if isinstance(mark, Ge | Gt | Le | Lt)}
        low = next((f"{mark.ge} <= x" for mark in marks.values() if isinstance(mark, Ge)), "") or next(
            (f"{mark.gt} < x" for mark in marks.values() if isinstance(mark, Gt)), ""
        )
        high = next((f" <= {mark.le}" for mark in marks.values() if isinstance(mark, Le)), "") or next(
            (f" < {mark.lt}" for mark in marks.values() if isinstance(mark, Lt)), ""
        )
        if low and not high:
            number, sign, _ = low.split()
            return f"{'>=' if sign == '<=' else '>'} {number}"
        return f"{low}{high}"


def _section_class(name: str) -> type[s.Section]:
    """The class of a section, also where the section is optional."""
    annotation = Config.model_fields[name].annotation
    options = get_args(annotation) or (annotation,)
    return next(option for option in options if isinstance(option, type) and issubclass(option, s.Section))


def _keys_of(section: str, model: type[s.Section]) -> dict[str, Key]:
    defaults = model()
    keys = [Key(section, field, name, getattr(defaults, name)) for name, field in model.model_fields.items()]
    return {key.path: key for key in keys}


SECTIONS: dict[str, type[s.Section]] = {name: _section_class(name) for name in Config.model_fields}
KEYS: dict[str, Key] = {path: key for name, model in SECTIONS.items() for path, key in _keys_of(name, model).items()}


# Arrays of tables, and what a table in them is.
ARRAYS: dict[str, type[s.Section]] = {"campaign.conditions": s.ConditionConfig, "reward.parts": RewardPart}


def key_at(location: Sequence[str | int]) -> Key:
    """The key of a place in a config: ("training", "lr"), or ("reward", "parts", 1, "type") within an array."""
    section, name, *inner = location or ("", "")
    table = ARRAYS.get(f"{section}.{name}")
    if table is None or len(inner) < 2:
        return KEYS[f"{section}.{name}"]
    attribute = str(inner[1])
    field = table.model_fields[attribute]
    return Key(str(section), field, attribute, field.default)


def keys_of(section: str) -> dict[str, Key]:
    """The keys of one section by their TOML names."""
    return {key.name: key for key in KEYS.values() if key.section == section}


def value_of(config: Config, key: Key) -> Any:
    """The value of a key; its default where the file has no such optional section."""
    section = getattr(config, key.section)
    return key.default if section is None else getattr(section, key.attribute)


def changed(config: Config) -> dict[str, Any]:
    """`section.key` -> value of the keys that differ from their defaults, in the order of the schema."""
    values = {path: value_of(config, key) for path, key in KEYS.items()}
    return {path: value for path, value in values.items() if value != KEYS[path].default}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors and other tools."""
    schema = Config.model_json_schema(by_alias=True)
    return {"$schema": JSON_SCHEMA_DIALECT, **_polish(schema), "title": "retrain configuration"}


def _polish(node: Any) -> Any:
    """Without the titles that pydantic makes up, and without null, which TOML does not have."""
    if isinstance(node, list):
        return [_polish(item) for item in node]
    if not isinstance(node, dict):
        return node
    cleaned = {}
    for name, value in node.items():
        if name == "properties":
            cleaned[name] = {key: _polish(inner) for key, inner in value.items()}
        elif not (name == "title" and isinstance(value, str)) and not (name == "default" and value is None):
            cleaned[name] = _polish(value)
    options = [option for option in cleaned.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        del cleaned["anyOf"]
        cleaned.update(options[0])
    elif options:
        cleaned["anyOf"] = options
    return cleaned
