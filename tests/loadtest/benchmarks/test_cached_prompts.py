"""The benchmark of cached prompts: its statistics, and a short run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loadtest.benchmarks.cached_prompts import main, quantiles


def test_percentiles_are_compared_with_an_interval_that_ignores_what_pairs_have_in_common():
    generator = np.random.default_rng(1)
    common = generator.exponential(50.0, 2000)
    pairs = np.stack([common, common + 0.5], axis=1)
    rows = quantiles(pairs)
    assert [row.percentile for row in rows] == [50, 90, 99]
    for row in rows:
        assert row.without_ms == pytest.approx(np.percentile(common, row.percentile))
        assert (row.added_ms, row.low_ms, row.high_ms) == pytest.approx((0.5, 0.5, 0.5))


def test_a_difference_within_the_noise_has_an_interval_around_zero():
    rows = quantiles(np.random.default_rng(2).exponential(1.0, (2000, 2)))
    for row in rows:
        assert row.low_ms < 0 < row.high_ms


@pytest.mark.slow
def test_a_short_run_writes_its_report(tmp_path: Path, capsys):
    main(["--size", "64", "--pairs", "10", "--json", str(tmp_path / "report.json")])
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["size"], document["pairs"]) == (64, 10)
    assert all(row["without_ms"] > 0 and row["cached_ms"] > 0 for row in document["quantiles"])
    assert "10 pairs of requests for 64x64" in capsys.readouterr().out
