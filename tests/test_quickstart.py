"""The promise of the first minute: the shipped quickstart learns."""

from __future__ import annotations

from pathlib import Path

from runs import lines, retrain

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"


def test_quickstart_learns(tmp_path: Path) -> None:
    """Up by 0.30 at least and above 0.80 at the end, with sampler and trainer agreeing on every token of the run."""
    done = retrain(QUICKSTART, "--log-dir", tmp_path / "run", timeout=480)
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    rates = [row["correct_rate"] for row in rows]
    first, last = sum(rates[:5]) / 5, sum(rates[-10:]) / 10
    assert 0.25 <= first <= 0.5
    assert last > 0.80
    assert last - first >= 0.30
    assert max(row["logprob_gap_max"] for row in rows) < 1e-4
    assert max(row["max_token_hit_rate"] for row in rows) < 0.05
    planning = [row["planning_fraction"] for row in rows]
    assert min(planning) > 0.02
    assert max(planning) < 0.2
    assert rows[-1]["sepa_lambda"] == 1.0
    assert all(row["warnings"] == [] and row["skipped_steps"] == 0 for row in rows), "no false alarm"
