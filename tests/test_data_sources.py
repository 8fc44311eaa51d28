"""MATH, GSM8K and datasets of the hub: the same examples from the hub's layout and from a folder's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import fake_hub
import runs
from retrain import data
from retrain.config import Config
from retrain.data.problem_sets import BOX_INSTRUCTION, SETS, final_number
from retrain.types import ConfigError, Example

PARTS = SETS["math"].parts
SPLITS = ("train", "test")


def section(source, **keys):
    return Config().data.model_copy(update={"source": str(source), **keys})


def load(source, **keys):
    said: list[str] = []
    return data.load(section(source, **keys), say=said.append).train, said


def refusal(source, **keys):
    with pytest.raises(ConfigError) as error:
        load(source, **keys)
    return str(error.value)


def math_rows(part, split="train", count=3):
    """Rows as the set has them, their answer in the last of several boxes."""
    return [
        {
            "problem": f"{part}, {split}: what is $\\frac{{{i}}}{{7}}$?",
            "level": "Level 1",
            "type": part,
            "solution": f"Not $\\boxed{{8}}$ but $\\boxed{{\\frac{{{i}}}{{7}}}}$.",
        }
        for i in range(count)
    ]


def math_examples(split="train", count=3):
    return tuple(
        Example(row["problem"] + BOX_INSTRUCTION, f"\\frac{{{i}}}{{7}}")
        for part in PARTS
        for i, row in enumerate(math_rows(part, split, count))
    )


GSM8K = [
    {"question": "Ann has 3 and 4.", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "And 1,000 more?", "answer": "#### is no answer yet\n#### 1,007 "},
]
GSM8K_EXAMPLES = (
    Example("Ann has 3 and 4." + BOX_INSTRUCTION, "7"),
    Example("And 1,000 more?" + BOX_INSTRUCTION, "1007"),
)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_hub(folder, parts, rows_of):
    """A dataset as the hub holds it: a Parquet file for each part and split, and a card that names them."""
    card = "---\nconfigs:\n"
    for part in parts:
        card += f"- config_name: {part}\n  data_files:\n"
        for split in SPLITS:
            path = folder / part / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(part, split)), path)
            card += f"  - split: {split}\n    path: {part}/{split}-*\n"
    (folder / "README.md").write_text(card + "---\n", encoding="utf-8")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder in which `datasets` finds org/name as a folder, its cache elsewhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.chdir(folder)
    datasets.disable_progress_bars()
    yield folder
    datasets.enable_progress_bars()


# ---------------------------------------------------------------- MATH


def test_math_from_a_folder_of_subjects(tmp_path):
    for part in (*PARTS, "algebra"):  # other subjects are not among the five
        write_jsonl(tmp_path / f"{part}.jsonl", math_rows(part))
    assert load(f"math:{tmp_path}") == (math_examples(), [])
    message = refusal(f"math:{tmp_path}", split="test")
    assert f"{tmp_path / PARTS[0]}.jsonl is not divided into splits; remove data.split" in message


def test_math_from_the_hub_and_from_a_copy_of_it(hub):
    write_hub(hub / "EleutherAI/hendrycks_math", PARTS, math_rows)
    for source in ("math", "math:EleutherAI/hendrycks_math"):
        assert load(source) == (math_examples(), [])
        assert load(source, split="test")[0] == math_examples("test")
        both = load(source, split="train+test")[0]
        assert set(both) == {*math_examples(), *math_examples("test")} and len(both) == 30
    assert load("math", split="train[:1]")[0] == math_examples(count=1)
    message = refusal("math", split="trian")
    assert 'data.split = "trian"' in message and "Should be one of ['train', 'test']" in message


def test_math_with_another_prompt(tmp_path):
    for part in PARTS:
        write_jsonl(tmp_path / f"{part}.jsonl", math_rows(part, count=1))
    (first, *_) = load(f"math:{tmp_path}", prompt_template="{type} ({level}): {problem} Answer: \\boxed{")[0]
    assert first.prompt == f"{PARTS[0]} (Level 1): {math_rows(PARTS[0])[0]['problem']} Answer: \\boxed{{"


def test_solutions_without_a_box(tmp_path):
    for part in PARTS:
        write_jsonl(tmp_path / f"{part}.jsonl", math_rows(part, count=10))
    rows = math_rows("geometry", count=10)
    for row, solution in zip(rows, ("It is 7.", "\\boxed{}", "\\boxed{7", "  "), strict=False):
        row["solution"] = solution
    write_jsonl(tmp_path / "geometry.jsonl", rows)
    examples, (line,) = load(f"math:{tmp_path}")
    assert len(examples) == 46
    assert line.startswith("4 of 50 examples are left out")
    assert 'geometry.jsonl:1: "solution" has no \\boxed{} answer: "It is 7."' in line
    for part in ("number_theory", "geometry"):
        write_jsonl(tmp_path / f"{part}.jsonl", rows)
    assert "8 of 50 references cannot be used, more than 10%" in refusal(f"math:{tmp_path}")


def test_a_folder_that_is_no_mirror(tmp_path):
    assert "no such folder" in refusal(f"math:{tmp_path}/none")
    message = refusal(f"math:{tmp_path}")
    assert f"the folder has none of {PARTS[0]}.jsonl, {PARTS[0]}/train.jsonl, {PARTS[0]}/train-*.parquet" in message
    write_jsonl(tmp_path / f"{PARTS[0]}.jsonl", [{"question": "q", "solution": "s"}])
    assert 'no field "problem"; it has question, solution' in refusal(f"math:{tmp_path}")


# ---------------------------------------------------------------- GSM8K


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("#### 7", "7"),
        ("a\n#### 1 #### -2.5 \n", "-2.5"),
        ("#### 1,234,567", "1234567"),
        ("#### 1, 234", "1, 234"),
        ("#### $3,000", "$3000"),
        ("7", None),
        ("7 ####", None),
        ("", None),
    ],
)
def test_final_number(solution, number):
    assert final_number(solution) == number


def test_gsm8k_in_every_layout(hub):
    write_hub(hub / "openai/gsm8k", ("main",), lambda part, split: GSM8K)
    write_jsonl(hub / "flat/train.jsonl", GSM8K)
    write_jsonl(hub / "deep/main/train.jsonl", GSM8K)
    for source in ("gsm8k", "gsm8k:openai/gsm8k", "gsm8k:flat", f"gsm8k:{hub}/deep"):
        assert load(source) == (GSM8K_EXAMPLES, [])
    assert load("gsm8k", split="test")[0] == GSM8K_EXAMPLES
    assert "none of test.jsonl, main/test.jsonl, main/test-*.parquet" in refusal("gsm8k:flat", split="test")


# ---------------------------------------------------------------- other datasets of the hub


def test_any_dataset_of_the_hub(hub):
    write_hub(hub / "org/name", ("easy", "hard"), lambda part, split: [{"q": f"{part} {split}", "a": 2.0}])
    fields = {"prompt_field": "q", "reference_field": "a"}
    assert load("org/name:hard", **fields)[0] == (Example("hard train", "2"),)
    assert load("org/name:easy", split="test", **fields)[0] == (Example("easy test", "2"),)
    assert load("org/name:easy", prompt_template="{a}: {q}", reference_field="q")[0] == (
        Example("2: easy train", "easy train"),
    )
    message = refusal("org/name:hard")
    assert message.startswith('org/name:hard[train][0]: no field "prompt"; it has q, a. Set data.prompt_field')
    assert "Config name is missing" in refusal("org/name", **fields)
    assert "['easy', 'hard']" in refusal("org/name:hrad", **fields)


LOADING = """
from retrain import data
from retrain.config import build
loaded = data.load(build({"data": {"source": "math", "split": "train+test"}}).data)
print(len(loaded.train), loaded.train[-1].id)
"""


def test_fetched_once_and_then_read_without_a_network(tmp_path):
    """Over HTTP from a hub of our own; then with the hub gone."""
    write_hub(tmp_path / "hub/EleutherAI/hendrycks_math", PARTS, math_rows)
    (tmp_path / "elsewhere").mkdir()

    def load_in_a_process(url, offline):
        return subprocess.run(
            [sys.executable, "-c", LOADING],
            env={**runs.environment(), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home")}
            | {"PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)},
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
            check=False,
        )

    with fake_hub.serving(tmp_path / "hub") as url:
        first = load_in_a_process(url, offline="0")
    assert first.stdout == f"30 {math_examples('test')[-1].id}\n", first.stderr
    again = load_in_a_process(url, offline="1")
    assert again.stdout == first.stdout, again.stderr


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("math", "gsm8k", "org/name"):
        assert 'pip install "retrain[data]"' in refusal(source)


def test_without_a_network_nothing_is_written(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE=1 is what `datasets` makes of an unreachable hub, without its half a minute of retries."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty cache"))
    log_dir = tmp_path / "logs"
    config = runs.write_config(tmp_path, log_dir)
    done = runs.retrain(config, "--source", "math", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    for needle in ("EleutherAI/hendrycks_math", "with the network on", 'data.source = "math:FOLDER"'):
        assert needle in done.stderr
    assert "Traceback" not in done.stderr
    assert not log_dir.exists()


def test_any_dataset_without_a_network(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal("org/name")
    assert message.startswith("data.source = \"org/name\": Couldn't reach 'org/name' on the Hub")
    assert message.endswith("Load it once with the network on: afterwards it is read from the cache")
