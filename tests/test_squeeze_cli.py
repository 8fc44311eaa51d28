"""`retrain squeeze`, the standalone config and the Python interface: what they print, write and refuse."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

import retrain
import tiny_models as models
from retrain import ConfigError, load_config
from retrain.cli import main
from retrain.squeeze.analysis import LayerSpectrum
from retrain.squeeze.table import ASCII_BARS, BARS, picture
from retrain.training.paired import paired_difference
from retrain.training.run import train
from retrain.types import RetrainError
from runs import retrain as command
from runs import write_config
from squeeze_adapters import adapted, edit_config, save

NOT_SQUEEZED = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def folder(tmp_path):
    """An adapter of rank 8 with two layers."""
    return save(adapted(), tmp_path / "adapter")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An adapter of rank 4 on builtin:tiny, and a config that evaluates it."""
    from retrain.backend.local import LocalBackend

    folder = tmp_path_factory.mktemp("tiny")
    config = write_config(folder, folder / "run", "[eval]\nexamples = 6\nsamples = 2\ntemperature = 1.0\n")
    config.write_text(config.read_text().replace("[data]\n", "[data]\neval_fraction = 0.1\n"))
    backend = LocalBackend(load_config(config), seed=0, say=lambda line: None)
    models.stir(backend.policy.peft, 0.05)
    (folder / "adapter").mkdir()
    backend.save_adapter(folder / "adapter")
    return folder / "adapter", config


def run(capsys, *arguments):
    status = main(["squeeze", *map(str, arguments)])
    seen = capsys.readouterr()
    return status, seen.out, seen.err


def test_analysis_as_text(capsys, folder):
    status, out, err = run(capsys, folder, "--min-variance-retention", 0.7)
    analysis = retrain.squeeze.analyze(folder, min_variance_retention=0.7)
    assert (status, err) == (0, "")
    assert f"{folder}: 2 layers, rank 8" in out
    assert f"Recommended: rank {analysis.recommended_rank}, the smallest that keeps 70.0% on average" in out
    for rank in analysis.ranks:
        assert re.search(
            rf"^ *{rank} +{analysis.mean_variance[rank]:.2%} +{analysis.min_variance[rank]:.2%} ", out, re.M
        )
    for layer in analysis.layers:
        assert f"{layer.name} " in out and picture(layer) in out
    assert sorted(path.name for path in folder.iterdir() if path.name != "README.md") == list(NOT_SQUEEZED)


def test_analysis_as_json(capsys, folder):
    status, out, _ = run(capsys, folder, "--target-ranks", "2,5,8", "--json")
    found = json.loads(out)
    analysis = retrain.squeeze.analyze(folder, target_ranks=[8, 2, 5])
    assert status == 0
    assert found["ranks"] == [2, 5, 8] == list(analysis.ranks)
    assert found["source_rank"] == 8
    assert found["compression"] is None
    assert {int(k): v for k, v in found["mean_variance"].items()} == analysis.mean_variance
    assert [len(layer["singular_values"]) for layer in found["layers"]] == [8, 8]
    # The recommendation goes by the mean; the minimum and its layer stand beside it.
    kept = {
        layer["name"]: [
            1 - sum(s**2 for s in layer["singular_values"][k:]) / sum(s**2 for s in layer["singular_values"])
            for k in (2, 5, 8)
        ]
        for layer in found["layers"]
    }
    for i, rank in enumerate(found["ranks"]):
        assert found["mean_variance"][str(rank)] == pytest.approx(sum(v[i] for v in kept.values()) / 2)
        assert found["min_variance"][str(rank)] == pytest.approx(min(v[i] for v in kept.values()))
    assert found["worst_layer"]["2"] == min(kept, key=lambda name: kept[name][0])
    expected = next(rank for rank in (2, 5, 8) if analysis.mean_variance[rank] >= 0.95)
    assert found["recommended_rank"] == expected


def test_default_candidates_are_powers_of_two_and_the_source_rank(tmp_path):
    folder = save(adapted(r=12), tmp_path)
    assert retrain.squeeze.analyze(folder).ranks == (1, 2, 4, 8, 12)


def test_an_untrained_adapter_needs_one_rank(tmp_path):
    from peft import LoraConfig, get_peft_model

    from squeeze_adapters import make_net

    get_peft_model(make_net(), LoraConfig(r=4, target_modules=["wide", "embed"])).save_pretrained(tmp_path)
    analysis = retrain.squeeze.analyze(tmp_path)
    assert analysis.recommended_rank == 1
    assert set(analysis.mean_variance.values()) == {1.0}
    assert {layer.singular_values for layer in analysis.layers} == {(0.0,) * 4}


def test_compression(capsys, folder, tmp_path):
    out = tmp_path / "new" / "out"
    status, text, _ = run(capsys, folder, "--output-path", out, "--compress-to", 4)
    assert status == 0
    assert "Squeezed to rank 4: keeps" in text and f"Written to {out}" in text
    assert sorted(path.name for path in out.iterdir()) == ["README.md", *NOT_SQUEEZED, "squeeze.json"]
    record = json.loads((out / "squeeze.json").read_text())
    assert record["compression"]["ranks"] == {"narrow": 4, "wide": 4}
    assert record["compression"]["mean_variance"] == pytest.approx(record["mean_variance"]["4"])
    assert record["compression"]["parameters"] * 2 == record["compression"]["source_parameters"]
    assert "of rank 8, squeezed to rank 4" in (out / "README.md").read_text()
    # Nothing temporary is left, and the source is as it was.
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_compression_to_the_recommended_rank_or_layer_by_layer(folder, tmp_path):
    done = retrain.squeeze.compress(folder, tmp_path / "a", min_variance_retention=0.7)
    assert set(done.ranks.values()) == {done.analysis.recommended_rank}
    done = retrain.squeeze.compress(folder, tmp_path / "b", min_variance_retention=0.7, per_layer=True)
    assert done.min_variance >= 0.7
    done = retrain.squeeze.compress(
        folder, tmp_path / "c", min_variance_retention=0.7, per_layer=True, target_ranks=[1, 6]
    )
    assert set(done.ranks.values()) <= {1, 6, 8}


def test_a_standalone_config(capsys, folder, tmp_path):
    config = tmp_path / "squeeze.toml"
    text = f'[squeeze]\nadapter_path = "{folder}"\noutput_path = "{tmp_path / "out"}"\nper_layer = true\n'
    config.write_text(text + "at_steps = [3]\nto_ranks = [2]\n[model]\nlora_rank = 8\n")
    done = command(config)
    assert (done.returncode, done.stderr) == (0, "")
    assert "squeeze.at_steps = [3]: no effect in a standalone squeeze" in done.stdout
    assert (tmp_path / "out" / "squeeze.json").is_file()
    # `retrain squeeze` takes it too; a flag wins over the file.
    assert run(capsys, config, "--no-per-layer", "--output-path", tmp_path / "two", "--compress-to", 2)[0] == 0
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(ConfigError, match="nothing to train"):
        train(load_config(config))


def test_source_rank(capsys, folder, tmp_path):
    status, _, err = run(capsys, folder, "--source-rank", 16)
    assert (status, "has rank 8, not 16 as squeeze.source_rank" in err) == (2, True)
    config = tmp_path / "c.toml"
    config.write_text(f'[squeeze]\nadapter_path = "{folder}"\n[model]\nlora_rank = 32\n')
    status, _, err = run(capsys, config)
    assert (status, "has rank 8, not 32" in err) == (2, True)
    assert run(capsys, folder, "--source-rank", 8)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compress-to", 9, "--output-path", "{out}"], "of rank 8, cannot be squeezed to 9"),
        (["--target-ranks", "4,16"], "of rank 8, cannot be squeezed to 16"),
        (["--output-path", "{adapter}"], "lies in the adapter's own folder"),
        (["--output-path", "{adapter}/small"], "lies in the adapter's own folder"),
        (["--output-path", "{full}"], "exists already and is never written over"),
        (["--output-path", "{adapter}/README.md/x"], "lies in the adapter's own folder"),
        (["--output-path", "{file}"], "exists already"),
        (["--output-path", "{file}/x"], "cannot be written"),
        (
            ["--output-path", "{out}", "--target-ranks", "1", "--min-variance-retention", "0.99"],
            "none of the ranks 1 keeps",
        ),
        (["--output-path", "{out}", "--per-layer", "--compress-to", "2"], "remove one of the two"),
        (["--device", "nonsense"], 'squeeze.device = "nonsense": cannot be used'),
        (["--device", "meta"], "cannot be used"),
        (["--squeeze-adapter-path", "x"], "given twice"),
        (["--eval", "{out}"], "no such file"),
    ],
)
def test_refused(capsys, folder, tmp_path, arguments, message):
    places = {"out": tmp_path / "out", "adapter": folder, "full": tmp_path / "full", "file": tmp_path / "file"}
    places["full"].mkdir()
    (places["full"] / "something").touch()
    places["file"].touch()
    before = set(tmp_path.rglob("*"))
    status, out, err = run(capsys, folder, *(str(word).format(**places) for word in arguments))
    assert (status, out) == (2, "")
    assert message in err
    assert set(tmp_path.rglob("*")) == before


def test_folders_that_hold_no_adapter(capsys, folder, tmp_path):
    assert "no such adapter folder" in run(capsys, tmp_path / "nowhere")[2]
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "final")
    status, _, err = run(capsys, tmp_path / "run")
    assert status == 2
    assert f"did you mean {tmp_path / 'run' / 'final'}?" in err
    config = tmp_path / "train.toml"
    config.write_text(f'[training]\nmax_steps = 1\n[logging]\nlog_dir = "{tmp_path / "run"}"\n')
    status, _, err = run(capsys, config)
    assert status == 2
    assert "squeeze.adapter_path: is not set; give the folder of an adapter" in err
    assert f"such as the one this config's run has written: {tmp_path / 'run' / 'final'}" in err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_variance_retention": 1.5}, "squeeze.min_variance_retention = 1.5: out of range"),
        ({"target_ranks": [4, 4]}, "squeeze.target_ranks: names a rank twice"),
        ({"target_ranks": [0]}, "squeeze.target_ranks: every rank must be >= 1"),
        ({"source_rank": -1}, "squeeze.source_rank = -1: out of range"),
    ],
)
def test_keys_are_checked_from_python_too(folder, keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        retrain.squeeze.analyze(folder, **keys)


def test_an_empty_output_folder_is_used(folder, tmp_path):
    (tmp_path / "out").mkdir()
    retrain.squeeze.compress(folder, tmp_path / "out", rank=2)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_experts_have_no_ranks_of_their_own(tmp_path):
    folder = save(adapted(target_modules=[], target_parameters=["experts.up"]), tmp_path / "a")
    with pytest.raises(ConfigError, match="PEFT has no rank_pattern for a layer's stacked parameters"):
        retrain.squeeze.compress(folder, tmp_path / "out", per_layer=True)
    with pytest.raises(ConfigError, match="with per_layer the ranks follow from"):
        retrain.squeeze.compress(folder, tmp_path / "out", per_layer=True, rank=2)


def test_evaluation_against_the_source(capsys, tiny, tmp_path):
    """Per-layer ranks included: rewards of both adapters on the same examples, beside the variance."""
    adapter, config = tiny
    status, out, err = run(
        capsys,
        adapter,
        "--output-path",
        tmp_path / "out",
        "--per-layer",
        "--min-variance-retention",
        0.5,
        "--eval",
        config,
        "--eval-examples",
        5,
    )
    assert (status, err) == (0, "")
    assert "Reward on 5 held-out examples x 2:" in out
    found = json.loads((tmp_path / "out" / "squeeze.json").read_text())["compression"]["evaluation"]
    assert (found["examples"], found["samples"], found["errors"]) == (5, 2, 0)
    assert found["difference"]["value"] == pytest.approx(found["after"] - found["before"])
    assert -1 <= found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"] <= 1


def test_evaluation_without_output_leaves_nothing_behind(capsys, tiny, tmp_path, monkeypatch):
    """An adapter against itself at the source rank: the same completions, so no difference, and no certainty either."""
    adapter, config = tiny
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, out, _ = run(capsys, adapter, "--compress-to", 4, "--eval", config, "--json")
    found = json.loads(out)["compression"]
    assert status == 0
    assert (found["output"], found["mean_variance"]) == ("", 1.0)
    difference = found["evaluation"]["difference"]
    assert difference["value"] == 0
    assert difference["low"] == -difference["high"] < 0
    assert list(tmp_path.iterdir()) == []


def test_evaluation_of_an_adapter_of_another_model(capsys, folder, tiny, tmp_path):
    edit_config(folder, base_model_name_or_path="x")
    status, _, err = run(capsys, folder, "--compress-to", 4, "--eval", tiny[1])
    assert status != 0
    assert "unexpected" not in err


def test_paired_difference_covers_the_truth():
    """95% intervals of 600 simulated comparisons, for verdicts and for rewards without bounds."""
    rng = np.random.default_rng(0)
    for bounded in (True, False):
        hits = 0
        for _ in range(600):
            skill = rng.random(40)
            if bounded:
                before, after = (rng.random(40) < skill * 0.8), (rng.random(40) < skill * 0.7)
                truth = -0.1 * 0.5
            else:
                before, after = 3 * skill + rng.normal(size=40), 3 * skill - 0.4 + rng.normal(size=40)
                truth = -0.4
            estimate = paired_difference([(float(a), float(b)) for a, b in zip(before, after, strict=True)])
            hits += estimate.low <= truth <= estimate.high
        low, high = stats.binom.ppf([0.001, 0.999], 600, 0.95)
        assert low <= hits <= high


def test_paired_difference_is_students_where_rewards_have_no_bounds():
    pairs = [(0.0, 2.0), (1.0, 1.5), (3.0, 2.0), (-1.0, 0.0)]
    estimate = paired_difference(pairs)
    interval = stats.ttest_rel([b for _, b in pairs], [a for a, _ in pairs]).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    with pytest.raises(RetrainError, match="one held-out example"):
        paired_difference([(0.0, 2.0)])


def test_the_picture_of_a_spectrum():
    def of(*values):
        return LayerSpectrum("x", "linear", (1, 1), 1, len(values), 1, 1.0, values, tuple(1.0 for _ in values))

    assert picture(of(8.0, 4.0, 1.0, 0.001, 0.0), BARS) == "█▄▁▁ "
    assert picture(of(0.0, 0.0), ASCII_BARS) == "  "
    assert len(picture(of(*(math.exp(-i) for i in range(64))))) == 24
