"""Rows of fields, from wherever they come, become examples: or are refused, with the place and the remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from retrain.types import ConfigError, Example

# Above this share of rows whose reference cannot be used, the field is more likely wrong than the rows are.
MAX_UNUSABLE_SHARE = 0.1
LISTED = 3

Row = tuple[str, Mapping[str, Any]]  # where the row stands, and its fields

# What a template fills in: {name}, but neither {} nor what stands in a box, which is an example of an answer.
_FIELD = re.compile(r"(\\(?:boxed|fbox)\{[^{}]*\})|\{([^{}]+)\}")


@dataclass(frozen=True)
class Recipe:
    r"""How a row becomes an example.

    prompt_field: the field that is the prompt. prompt_template: text with {field} for a row's fields, and then the
    prompt; "" = the prompt field as it is. find: takes the reference out of the text in the reference field, None where
    it holds none; `missing` says what it then lacks.
    """

    prompt_field: str
    reference_field: str
    prompt_template: str = ""
    find: Callable[[str], str | None] = lambda text: text
    missing: str = "text"

    def prompt(self, place: str, fields: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises ConfigError where a field is missing or holds no text."""
        if self.prompt_template:
            return _FIELD.sub(lambda part: part[1] or self._filled(place, fields, part[2]), self.prompt_template)
        prompt = _field(place, fields, self.prompt_field, "data.prompt_field")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f'{place}: "{self.prompt_field}" must be a non-empty string, not {shown(prompt)}')
        return prompt

    def reference(self, place: str, fields: Mapping[str, Any]) -> str | None:
        """The reference of a row, None where it has none that could be compared with."""
        value = _field(place, fields, self.reference_field, "data.reference_field")
        text = _as_text(value)
        return None if text is None else self.find(text)

    def _filled(self, place: str, fields: Mapping[str, Any], name: str) -> str:
        text = _as_text(_field(place, fields, name, "data.prompt_template"))
        if text is None:
            raise ConfigError(
                f'{place}: "{name}" must be a non-empty string or a number, not {shown(fields[name])}; '
                "data.prompt_template needs it"
            )
        return text


def read_examples(rows: Iterable[Row], recipe: Recipe, *, say: Callable[[str], None]) -> list[Example]:
    """The examples in `rows`. Rows whose reference cannot be used are left out, which is said, with the first few.

    Raises ConfigError where a field is missing or a prompt empty, and where too many references cannot be used.
    """
    examples: list[Example] = []
    places: list[str] = []
    unusable: list[str] = []
    for place, fields in rows:
        prompt, reference = recipe.prompt(place, fields), recipe.reference(place, fields)
        if reference is None:
            unusable.append(f"{place}: {_complaint(recipe, fields[recipe.reference_field])}")
            continue
        try:
            examples.append(Example(prompt, reference))
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None
        places.append(place)
    _check_unusable(unusable, len(unusable) + len(examples), say)
    _report_conflicts(examples, places, say)
    return examples


def check_ids(rows: Iterable[Row]) -> None:
    """Raise ConfigError where two rows have the same `id`: one of them is not what it says it is."""
    first: dict[str, str] = {}
    for place, fields in rows:
        if fields.get("id") is None:
            continue
        name = shown(fields["id"])
        if name in first:
            raise ConfigError(
                f"{place}: the id {name} stands at {first[name]} already. Remove one of the two rows, or give it an id "
                'of its own; a field that need not be unique must not be named "id"'
            )
        first[name] = place


def shown(value: Any) -> str:
    """A value as JSON has it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."


def _field(place: str, fields: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in fields:
        has = ", ".join(map(str, fields)) or "no field at all"
        raise ConfigError(f'{place}: no field "{name}"; it has {has}. Set {key} to the one to use')
    return fields[name]


def _as_text(value: Any) -> str | None:
    """A string or number as text, None for anything else. 145.0 is "145": it is compared with what a model writes."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else str(value)


def _complaint(recipe: Recipe, value: Any) -> str:
    if _as_text(value) is None:
        return f'"{recipe.reference_field}" must be a non-empty string or a number, not {shown(value)}'
    return f'"{recipe.reference_field}" has no {recipe.missing}: {shown(value)}'


def _check_unusable(unusable: list[str], total: int, say: Callable[[str], None]) -> None:
    if not unusable:
        return
    few = "; ".join(unusable[:LISTED]) + ("; ..." if len(unusable) > LISTED else "")
    if len(unusable) > MAX_UNUSABLE_SHARE * total:
        raise ConfigError(
            f"{few}\n{len(unusable)} of {total} references cannot be used, more than {MAX_UNUSABLE_SHARE:.0%}: "
            "set data.reference_field to another field, or correct the rows"
        )
    say(f"{len(unusable)} of {total} examples are left out, their references cannot be used: {few}")


def _report_conflicts(examples: list[Example], places: list[str], say: Callable[[str], None]) -> None:
    """Equal examples are one problem met more often; one prompt with several references is right once at most."""
    first: dict[str, int] = {}
    conflicts: dict[str, int] = {}
    for i, example in enumerate(examples):
        before = first.setdefault(example.prompt, i)
        if example.reference != examples[before].reference:
            conflicts.setdefault(example.prompt, i)
    if conflicts:
        prompt, second = next(iter(conflicts.items()))
        i = first[prompt]
        count = "1 prompt stands" if len(conflicts) == 1 else f"{len(conflicts)} prompts stand"
        say(
            f"{count} with different references, such as {shown(prompt)}: "
            f"{shown(examples[i].reference)} at {places[i]}, {shown(examples[second].reference)} at {places[second]}"
        )
