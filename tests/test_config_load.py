"""TOML files: errors that name the place and the remedy, overrides, the round trip, .env."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retrain.config import KEYS, SECTIONS, Config, build, dump_toml, load_config, to_dict, value_of
from retrain.config.dotenv import load_dotenv
from retrain.config.load import find_line
from retrain.config.schema import Key, keys_of
from retrain.types import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path
    for pattern in ("configs/*.toml", "campaigns/*.toml", "retrain/templates/*.toml", "retrain.toml")
    for path in ROOT.glob(pattern)
)


def write(folder: Path, text: str, name: str = "c.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | str, overrides: Mapping[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert refused.value.exit_status == 2
    return str(refused.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_resolves(path: Path) -> None:
    load_config(path)


def test_absent_sections_take_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()


def test_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff[training]\nlr = 1")).training.lr == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[training]\nlr = = 3\n", "{path}:2:6: TOML syntax: Invalid value"),
        ('[training]\nlr = """abc', "{path}:2:12: TOML syntax: Unterminated string"),
        ("[training]\nlr=1\nlr=2\n[x]", "{path}:3:5: TOML syntax: Cannot overwrite a value"),
        ("# a\n\n[trainng]\nlr = 1", "{path}:3: [trainng]: unknown section; did you mean [training]?"),
        ("[training]\n\ngrup_size = 3", '{path}:3: training.grup_size: unknown key; did you mean "group_size"?'),
        ("[training]\nbeta = 1", "{path}:2: training.beta: unknown key; it belongs in [gtpo]"),
        ("[reward]\nalpha = 1", "{path}:2: reward.alpha: unknown key; it belongs in [lora] or [hicra]"),
        (
            "[training]\nsteps = 1",
            '{path}:2: training.steps: unknown key; did you mean "max_steps", or steps in [sepa]?',
        ),
        ("lr = 3", "{path}:1: lr = 3: stands outside any section; it belongs in [training]"),
        ("training = 3", "{path}:1: training = 3: must be a section, written as [training]"),
        ("[gtpo]\nfrobnicate = 1", "{path}:2: gtpo.frobnicate: unknown key; [gtpo] has beta"),
        ("[training]\ntraining.lr = 1", "{path}:2: training.training: unknown key"),
        ("training.lr = 'x'", '{path}:1: training.lr = "x": must be a number'),
        (
            '[reward]\ntype = "maths"',
            '{path}:2: reward.type = "maths": must be one of match, math, judge, custom; did you mean "math"?',
        ),
        (
            '[algorithm]\nadvantage_mode = "maxrll"',
            '{path}:2: algorithm.advantage_mode = "maxrll": must be one of grpo, dr_grpo, rloo, reinforce_pp, maxrl '
            'or a dotted path pkg.mod.fn; did you mean "maxrl"?',
        ),
        (
            "[squeeze]\ntarget_ranks = [4, '8']",
            '{path}:2: squeeze.target_ranks[1] = "8": must be an integer; write 8 without quotes',
        ),
        (
            "[campaign]\n[[campaign.conditions]]\nnme = 'x'",
            '{path}:2: campaign.conditions[0].nme: unknown key; did you mean "name"?',
        ),
    ],
)
def test_message(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(expected.format(path=path))
    assert "\n" not in message


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nlr = -1\n[gtpo]\nbeta = 'x'\n[eval]\nevery = -1\n")
    lines = refusal(path).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:2", f"{path}:6", f"{path}:4"]


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("retrain.toml") == (
        "no retrain.toml here; give the path of a config, or write one with `retrain init`"
    )
    assert refusal("config.toml") == "config.toml: no such file; write one with `retrain init`"
    write(tmp_path, "", "quickstart.toml")
    assert refusal("quikstart.toml") == 'quikstart.toml: no such file; did you mean "quickstart.toml"?'
    assert refusal("nowhere/quickstart.toml").startswith("nowhere/quickstart.toml: no such file")


@pytest.mark.parametrize("text", [f"a = {'9' * 5000}", f"a = {'[' * 5000}"], ids=["digits", "brackets"])
def test_what_the_parser_gives_up_on(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert refusal(path).startswith(f"{path}: TOML syntax: ")


def test_what_is_no_text_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: is a folder; give the path of a TOML file"
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# caf\xe9\n")
    assert refusal(path) == f"{path}: is not UTF-8 text (byte 5); save it as UTF-8"


def _transposed(name: str) -> str:
    """The name with two of its inner letters swapped, a usual slip."""
    middle = next(i for i in range(len(name) // 2, 0, -1) if name[i] != name[i - 1])
    return name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]


@pytest.mark.parametrize("key", [key for key in KEYS.values() if len(key.name) > 3], ids=lambda key: key.path)
def test_a_slip_in_any_key_is_understood(key: Key) -> None:
    slip = _transposed(key.name)
    assert slip not in keys_of(key.section)
    with pytest.raises(ConfigError, match=f'did you mean "{key.name}"'):
        build({key.section: {slip: 1}})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_slip_in_any_section_is_understood(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean \[{section}\]"):
        build({_transposed(section): {}})


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nlr = 1\nseed = 5")
    config = load_config(path, {"training.lr": 1e-4, "squeeze.compress_to": 4})
    assert (config.training.lr, config.training.seed) == (1e-4, 5)
    assert config.squeeze is not None
    assert config.squeeze.compress_to == 4
    assert refusal(path, {"training.lr": "1e-4"}) == (
        'training.lr = "1e-4": must be a number; write 1e-4 without quotes'
    )
    assert refusal(path, {"training.lrr": 1}) == 'training.lrr: unknown key; did you mean "lr"?'
    assert refusal(path, {"lr": 1}) == "lr: unknown key; write training.lr"
    assert refusal(path, {"alpha": 1}) == "alpha: unknown key; write lora.alpha or hicra.alpha"
    assert refusal(path, {"trainin.lr": 1}) == 'trainin.lr: unknown key; did you mean "training.lr"?'


def test_an_override_repairs_a_wrong_value_in_the_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "[training]\nlr = -1"), {"training.lr": 1}).training.lr == 1


def test_find_line() -> None:
    text = "# lr = 1\n[a]\nlr = 1\n[ training ]\nseed = 1\n'lr' = 2\n[training.sub]\nlr = 1\n"
    assert find_line(text, "training", "lr") == 6
    assert find_line(text, "training") == 4
    assert find_line(text, "a", "lr") == 3
    assert find_line(text, "training", "nothing") is None


# ---- round trip

TEXT = st.text(max_size=20)
JSON_VALUE = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAME = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
SPECIAL = {
    "training.max_staleness": st.integers(0, 2),
    "backend.devices": st.sampled_from(["cpu", "mps", "gpu", "gpu:1", "cuda:0,cpu"]),
    "data.source": st.sampled_from(["arithmetic", 'a\\b "c".jsonl', "org/name", "pkg.mod.fn", "reasoning_gym:x"]),
    "lora.target_modules": st.just("all-linear") | st.lists(NAME, min_size=1, max_size=3),
    "environment.args": st.dictionaries(TEXT, JSON_VALUE, max_size=3),
    "squeeze.target_ranks": st.lists(st.integers(1, 64), unique=True, max_size=4),
    "campaign.seeds": st.lists(st.integers(0, 2**32 - 1), unique=True, min_size=1, max_size=4),
    "campaign.conditions": st.lists(
        st.fixed_dictionaries({}, optional={"name": NAME, "overrides": st.just({"training.lr": 0.5})}), max_size=2
    ),
}
UNIT_INTERVAL = {">= 0": (0, 100), "0 <= x <= 1": (0, 1), "0 <= x < 1": (0, 0.99), "0 < x <= 1": (0.01, 1)}


def values_of(key: Key) -> st.SearchStrategy[Any]:
    if key.path in SPECIAL:
        return SPECIAL[key.path]
    if key.choices:
        return st.sampled_from(key.choices)
    match key.type:
        case "bool":
            return st.booleans()
        case "int":
            return st.integers(1, 1000)
        case "float":
            low, high = UNIT_INTERVAL.get(key.range, (0.01, 2))
            return st.floats(low, high) | st.just(1).filter(lambda one: low <= one <= high)
    return st.text(min_size=1, max_size=20)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    chosen = draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=8))
    data: dict[str, dict[str, Any]] = {}
    for path in chosen:
        key = KEYS[path]
        data.setdefault(key.section, {})[key.name] = draw(values_of(key))
    return data


@settings(max_examples=150, deadline=None)
@given(documents())
def test_what_is_dumped_loads_back_equal(data: dict[str, dict[str, Any]]) -> None:
    try:
        config = build(data)
    except ConfigError as refused:
        # Only for what one table forbids in combination: the values alone are all in range.
        assert "out of range" not in str(refused)
        assume(False)
        return
    text = dump_toml(config)
    plain = tomllib.loads(text)
    assert build(plain) == config
    assert plain == to_dict(config)
    for section, table in data.items():
        for name, value in table.items():
            if (section, name) != ("campaign", "conditions"):
                assert plain[section][name] == value


def test_the_resolved_config_holds_every_key_of_its_sections(tmp_path: Path) -> None:
    plain = tomllib.loads(dump_toml(Config()))
    assert {f"{section}.{name}" for section, table in plain.items() for name in table} == {
        path for path in KEYS if not path.startswith(("squeeze.", "campaign."))
    }
    path = write(tmp_path, dump_toml(Config()))
    assert all(value_of(load_config(path), key) == key.default for key in KEYS.values())


# ---- .env


def test_dotenv(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(
        "# keys\n"
        "A=plain value  # comment\n"
        "export B = 'single # quoted \\n'\n"
        'C="double \\"quoted\\"\\n\\\\" # comment\n'
        "D=\n"
        "E=http://x/#fragment\n"
        "PRESENT=from file\n"
        "this is wrong\n"
        "F='never closed\n"
        "2X=1\n",
        encoding="utf-8",
    )
    environ = {"PRESENT": "from environment"}
    warnings = load_dotenv(environ, path)
    assert environ == {
        "A": "plain value",
        "B": "single # quoted \\n",
        "C": 'double "quoted"\n\\',
        "D": "",
        "E": "http://x/#fragment",
        "PRESENT": "from environment",
    }
    assert warnings == [f"{path}:{line}: skipped; write NAME=value" for line in (8, 9, 10)]


def test_dotenv_absent_or_unreadable(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    assert load_dotenv(environ, tmp_path / ".env") == []
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    assert load_dotenv(environ, tmp_path / ".env") == [f"{tmp_path / '.env'}: not loaded: UnicodeDecodeError"]
    assert environ == {}
