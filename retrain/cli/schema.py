"""`retrain schema`: the JSON Schema of the config."""

from __future__ import annotations

import json

from retrain.cli.flags import parse
from retrain.config import json_schema


def run(argv: list[str]) -> int:
    parse(argv, "schema")
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0
