"""Flags: one for every key, spelt as promised, and errors that name the nearest."""

from __future__ import annotations

from typing import Any

import pytest

from retrain.cli.flags import FLAGS, NEGATIVE, main_flag, parse, placeholder, spellings
from retrain.config import KEYS, Key, build, value_of
from retrain.types import ConfigError

# From the reference that users were given.
PROMISED = {
    "--advantage-mode": "algorithm.advantage_mode",
    "--transform-mode": "algorithm.transform_mode",
    "--seed": "training.seed",
    "--lr": "training.lr",
    "--batch-size": "training.batch_size",
    "--group-size": "training.group_size",
    "--max-steps": "training.max_steps",
    "--lora-rank": "model.lora_rank",
    "--log-dir": "logging.log_dir",
    "--wandb-project": "logging.wandb_project",
    "--wandb-entity": "logging.wandb_entity",
    "--wandb-group": "logging.wandb_group",
    "--wandb-tags": "logging.wandb_tags",
    "--wandb-run-name": "logging.wandb_run_name",
    "--resume": "resume.from",
    "--hicra-alpha": "hicra.alpha",
    "--lora-alpha": "lora.alpha",
    "--sepa-steps": "sepa.steps",
    "--model": "model.model",
    "--backend": "backend.backend",
    "--planning-model": "planning.model",
    "--target-ranks": "squeeze.target_ranks",
    "--min-variance-retention": "squeeze.min_variance_retention",
    "--compress-to": "squeeze.compress_to",
    "--output-path": "squeeze.output_path",
    "--device": "squeeze.device",
    "--training.max_steps": "training.max_steps",
    "--training.max-steps": "training.max_steps",
    "--campaign-max-steps": "campaign.max_steps",
    "--resume.from": "resume.from",
}

# How a value is written for each type, and what it means.
EXAMPLES: dict[str, tuple[str, Any]] = {
    "bool": ("true", True),
    "int": ("3", 3),
    "float": ("0.5", 0.5),
    "str": ("x", "x"),
    "list[int]": ("4,8", [4, 8]),
    "str / list[str]": ("q_proj,v_proj", ["q_proj", "v_proj"]),
    "table / str": ('{"a": 1}', '{"a": 1}'),
    "list[table]": ('[{"name": "a"}]', [{"name": "a"}]),
}


def refusal(*argv: str, command: str = "train") -> str:
    with pytest.raises(ConfigError) as refused:
        parse(argv, command)
    return str(refused.value)


@pytest.mark.parametrize("flag", PROMISED)
def test_promised_flag(flag: str) -> None:
    assert FLAGS[flag].path == PROMISED[flag]


def test_no_flag_stands_for_two_keys() -> None:
    everything = [flag for key in KEYS.values() for flag in spellings(key)]
    assert len(everything) == len(set(everything)) == len(FLAGS)
    assert not set(FLAGS) & set(NEGATIVE)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_key_is_reached_by_every_spelling(key: Key) -> None:
    text, value = EXAMPLES[key.type]
    assert f"--{key.path}" in spellings(key)
    assert main_flag(key) == spellings(key)[0]
    for flag in spellings(key):
        assert parse([f"{flag}={text}"]).overrides == {key.path: value}
        if key.type == "bool":
            assert parse([flag]).overrides == {key.path: True}
            assert parse([f"--no-{flag[2:]}"]).overrides == {key.path: False}
        else:
            assert parse([flag, text]).overrides == {key.path: value}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_the_rule_of_names(key: Key) -> None:
    sharing = [other for other in KEYS.values() if other.name == key.name]
    bare = f"--{key.name.replace('_', '-')}"
    if len(sharing) == 1 or key.name == key.section:
        assert FLAGS[bare] is key
    elif key.path not in ("training.max_steps", "campaign.max_steps"):
        assert FLAGS.get(bare) is not key
        assert main_flag(key) == f"--{key.section}{bare[1:]}"


def test_values_reach_the_config() -> None:
    argv = "c.toml --seed -1 --lr 1e-4 --no-shuffle --target-modules all-linear --seeds 1,2 --environment-args {}"
    parsed = parse(argv.split())
    assert parsed.config_path == "c.toml"
    config = build({}, parsed.overrides)
    assert (config.training.seed, config.training.lr, config.data.shuffle) == (-1, 1e-4, False)
    assert config.lora.target_modules == "all-linear"
    assert value_of(config, KEYS["campaign.seeds"]) == (1, 2)
    assert config.environment.args == {}


def test_flags_and_the_file_in_any_order() -> None:
    assert parse(["--seed", "1", "c.toml"]) == parse(["c.toml", "--seed=1"])
    assert parse(["--", "--odd.toml"]).config_path == "--odd.toml"
    assert parse([]).config_path is None
    assert parse(["--log-dir=--odd"]).overrides == {"logging.log_dir": "--odd"}


def test_options_of_commands() -> None:
    assert parse(["c.toml", "--adapter", "a", "--json", "--lr", "1"], "eval").options == {"adapter": "a", "json": True}
    assert parse(["c.toml"], "eval").options == {"adapter": None, "json": False}
    assert parse(["logs", "-o", "x.html"], "report").options == {"o": "x.html"}
    assert parse(["--template=gpu", "x.toml"], "init").options == {"template": "gpu"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bach-size", "3"], "--bach-size: unknown flag; did you mean --batch-size?"),
        (["--batch_size", "3"], "--batch_size: unknown flag; did you mean --batch-size?"),
        (["--no-shufle"], "--no-shufle: unknown flag; did you mean --no-shuffle?"),
        (["--temperature", "1"], "--temperature: unknown flag; write --training-temperature or --eval-temperature"),
        (["--alpha", "1"], "--alpha: unknown flag; write --lora-alpha or --hicra-alpha"),
        (["--xyzzyx"], "--xyzzyx: unknown flag; see `retrain --help`"),
        (["-v"], "-v: unknown flag"),
        (["--no-lr"], "--no-lr: unknown flag"),
        (["--lr"], "--lr: needs a value, NUMBER"),
        (["--lr", "--seed", "1"], "--lr: needs a value, NUMBER"),
        (["--reward.type"], "--reward.type: needs a value, match|math|judge|custom"),
        (["--lr", "fast"], "--lr fast: must be a number"),
        (["--seed=1.5"], "--seed 1.5: must be an integer"),
        (["--shuffle=maybe"], "--shuffle maybe: must be true or false"),
        (["--no-shuffle=1"], "--no-shuffle: takes no value"),
        (["--target-ranks", "4,x"], "--target-ranks 4,x: must be integers, as in 4,8"),
        (["--conditions", "{"], "--conditions {: must be JSON"),
        (["--lr", "1", "--lr", "2"], "--lr: given twice; give it once"),
        (["--lr", "1", "--training.lr", "2"], "--training.lr: given twice (first as --lr); give it once"),
        (["--shuffle", "--no-shuffle"], "--no-shuffle: given twice (first as --shuffle); give it once"),
        (["a.toml", "b.toml"], '"b.toml": one argument too many; the usage is: retrain [CONFIG.toml]'),
        (["explian", "b.toml"], '"explian": unknown command; did you mean `retrain explain`?'),
    ],
)
def test_message(argv: list[str], expected: str) -> None:
    assert refusal(*argv).startswith(expected)


def test_messages_of_commands() -> None:
    assert refusal("x", "--jsn", command="status") == "--jsn: unknown flag; did you mean --json?"
    assert refusal("x", "--lr", "1", command="status").startswith("--lr: unknown flag")
    assert refusal("c.toml", "--adaptor", "x", command="eval") == "--adaptor: unknown flag; did you mean --adapter?"
    assert refusal("--json=1", command="eval") == "--json: takes no value"
    assert refusal("--adapter", command="eval") == "--adapter: needs a value, DIR"
    assert refusal("x", command="schema").startswith('"x": one argument too many; the usage is: retrain schema')


def test_placeholders() -> None:
    assert placeholder(KEYS["training.lr"]) == "NUMBER"
    assert placeholder(KEYS["data.shuffle"]) == ""
    assert placeholder(KEYS["environment.provider"]) == '""|verifiers'
