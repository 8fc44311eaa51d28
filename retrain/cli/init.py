"""`retrain init`: a commented config to begin with."""

from __future__ import annotations

from pathlib import Path

from retrain.cli.flags import parse
from retrain.config import DEFAULT_PATH
from retrain.config.suggest import did_you_mean
from retrain.types import ConfigError

TEMPLATES = Path(__file__).parents[1] / "templates"
FIRST = "quickstart"


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.toml"))


def run(argv: list[str]) -> int:
    parsed = parse(argv, "init")
    name = parsed.options["template"] or FIRST
    if name not in template_names():
        known = ", ".join(template_names())
        raise ConfigError(f"--template {name}: must be one of {known}{did_you_mean(name, template_names())}")
    target = Path(parsed.config_path or DEFAULT_PATH)
    if target.is_dir():
        target /= DEFAULT_PATH
    _write_new(target, (TEMPLATES / f"{name}.toml").read_text(encoding="utf-8"))
    print(f"wrote {target} (template {name})")
    print(f"next: retrain explain {target}, then retrain {target}")
    return 0


def _write_new(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already and is not overwritten; give another path") from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be written: {exc.strerror}") from None
