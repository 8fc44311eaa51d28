"""Phrases mined from a run's own successful completions, and the `retrain planning` command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.assets import resolve_model
from retrain.cli import main
from retrain.planning import detect
from retrain.planning.encoder import open_encoder
from retrain.planning.mine import _clusters, mine, ngrams
from retrain.planning.regex import compile_grams, occurrences, parse_grams
from retrain.types import RetrainError

SOLVED = [
    "Units: 7+8=15. Let me check: 77-27=50. So \\boxed{77}",
    "Wait, let me check that. It is 5.",
    "Let me verify this. The answer is 3.",
    "let me verify this again. The answer is 4.",
    "Let me check: 1-1=0. The answer is 5.",
]


def write_run(folder: Path, completions: list[tuple[str, float | None]]) -> Path:
    folder.mkdir()
    rows = [{"step": 1, "completion": text, "reward": reward} for text, reward in completions]
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_ngrams_by_hand():
    assert list(ngrams("Let me check that: one two\nthree, it\u2019s not right")) == [
        *("let me check", "me check that", "let me check that"),
        "it\u2019s not right",
    ]
    assert list(ngrams("a b 3 c d x2 e f g")) == ["e f g"]
    assert len(list(ngrams("one two three four five six"))) == 4 + 3 + 2


@given(
    st.lists(st.sampled_from(["let", "me", "It's", "é", "a1", "😀", ".", " ", "  ", "\n", "\t", "\u2019", "_"])).map(
        "".join
    )
)
def test_the_regex_detector_finds_every_ngram_where_it_was_found(text):
    for gram in ngrams(text):
        assert 3 <= len(gram.split()) <= 5
        assert list(occurrences(compile_grams([gram]), text))


def one_hot(texts):
    """An encoder to which phrases with the same first word are the same, and all others orthogonal."""
    first = sorted({text.split()[0] for text in texts})
    return np.eye(len(first))[[first.index(text.split()[0]) for text in texts]]


def test_clusters_are_ranked_by_the_documents_that_hold_a_member():
    texts = ["so we have", "so we get", "now go on", "now go on 1", "now you go", "so we get"]
    got = [(cluster.gram, cluster.documents, cluster.members) for cluster in mine(texts, one_hot, least=1)]
    assert got == [
        ("now go on", 3, ("now go on", "now you go")),
        ("so we get", 2, ("so we get", "so we have")),  # the same completion twice is one document
    ]
    assert [cluster.gram for cluster in mine(texts, one_hot)] == ["now go on"]
    with pytest.raises(RetrainError, match="in 4 different completions"):
        mine(texts, one_hot, least=4)


def test_clustering_is_that_of_average_linkage():
    from scipy.cluster.hierarchy import fcluster, linkage

    rows = np.random.default_rng(0).normal(size=(60, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    want = fcluster(linkage(rows, "average", metric="cosine"), 0.4, "distance")
    got = np.array(_clusters(rows))
    assert ((got[:, None] == got) == (want[:, None] == want)).all() and 1 < len(set(want)) < 60
    assert _clusters(rows[:1]) == [0]


def test_phrases_that_mean_the_same_are_one():
    clusters = mine(SOLVED, open_encoder("all-MiniLM-L6-v2"))
    assert clusters == mine(reversed(SOLVED), open_encoder("all-MiniLM-L6-v2"))
    assert [(cluster.gram, cluster.documents) for cluster in clusters] == [("let me check", 5), ("the answer is", 3)]
    assert "let me verify" in clusters[0].members


def test_the_command_mines_what_was_solved(tmp_path, capsys):
    run = write_run(tmp_path / "run", [*((text, 1.0) for text in SOLVED), ("never mind that", 0.0), ("x", None)])
    assert main(["planning", "mine", str(run)]) == 0
    text = capsys.readouterr().out
    assert "5 of 7 completions solved, 5 of them different" in text and "let me check" in text
    written = tomllib.loads(text[text.index("[logging]") :])["logging"]["strategic_grams"]
    assert parse_grams(written)[0] == "let me check" and "never" not in text
    assert main(["planning", "mine", str(run), "--json", "--top", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [cluster["gram"] for cluster in facts["clusters"]] == ["let me check"]
    assert tomllib.loads(facts["toml"]) == {"strategic_grams": "let me check"}


def shown(capsys, *arguments: str) -> str:
    assert main(["planning", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_marks_the_tokens_that_plan(tmp_path, capsys):
    text = "So 47 + 38. 😀 Wait, let me check: é?"
    assert shown(capsys, text).startswith("So 47 + 38. 😀 Wait,[ let me check]: é?\n")
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert shown(capsys, str(file)) == shown(capsys, text)
    facts = json.loads(shown(capsys, text, "--json"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [token["id"] for token in facts["tokens"]] == ids
    assert [token["planning"] for token in facts["tokens"]] == detect("regex", ids, tokenizer).tolist()
    assert shown(capsys, text, "--strategic-grams", "so").startswith("[So] 47")


def test_the_config_says_which_detector_and_grams(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text('[model]\nmodel = "builtin:tiny"\n[logging]\nstrategic_grams = "carry"\n', encoding="utf-8")
    text = "let me carry 1"
    assert shown(capsys, text, "--config", str(config)).startswith("let me[ carry] 1\n")
    assert shown(capsys, text, "--config", str(config), "--strategic-grams", "let me").startswith("[let me] carry 1\n")


def test_on_a_terminal_planning_is_coloured(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(capsys, "so let me check")
    assert "\x1b[" in text.split("\n")[0] and "[ let me check]" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a text or a file"),
        (["mine"], "give the folder of one run"),
        (["mine", "{tmp}"], "there is no run with a generations.jsonl"),
        (["mine", "{tmp}/failed"], "none of the 2 completions in .* has a reward above 0.5"),
        (["mine", "{tmp}/failed", "--top", "0"], "--top 0: must be an integer of 1 or more"),
        (["let", "me"], '"me": one argument too many; put the text in quotes'),
        (["let me", "--top", "3"], "--top: only `retrain planning mine`"),
        (["missing.txt"], "missing.txt: cannot be read: No such file"),
        (["{tmp}/latin.txt"], r"is not UTF-8 text \(byte 0\)"),
        (["let me", "--model", "{tmp}"], "its tokenizer cannot be loaded"),
        (["let me", "--strategic-grams", "a,,b"], "logging.strategic_grams: '' is not a phrase"),
        (["let me", "--detector", "regexp"], 'did you mean "regex"'),
        (["let me", "--detector", "semantic", "--planning-model", "{tmp}"], "planning.model"),
    ],
)
def test_wrong_usage_is_said(tmp_path, capsys, arguments, message):
    write_run(tmp_path / "failed", [("a b c", 0.0), ("a b c", None)])
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    assert main(["planning", *(word.replace("{tmp}", str(tmp_path)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error


def test_a_gram_that_occurs_in_too_few_completions(tmp_path, capsys):
    run = write_run(tmp_path / "run", [("so we have it", 1.0)])
    assert main(["planning", "mine", str(run)]) == 1
    assert "in 2 different completions" in capsys.readouterr().err


def test_help_loads_no_torch():
    code = "import sys; from retrain.cli import main; main(['planning', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "mine LOG_DIR" in done.stdout
