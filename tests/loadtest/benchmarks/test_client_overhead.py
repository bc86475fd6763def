"""The benchmark of the Python client: its comparison, and a short run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loadtest.benchmarks.client_overhead import Case, compare, main


def test_each_client_is_compared_with_httpx():
    httpx = np.random.default_rng(1).exponential(0.05, 500)
    seconds = {
        "PidClient": httpx + 0.001,
        "httpx.Client": httpx,
        "AsyncPidClient": 2 * httpx + 0.002,
        "httpx.AsyncClient": 2 * httpx,
    }
    rows = compare(Case(64, "raw", torch.empty(0), 500), {name: list(values) for name, values in seconds.items()})
    assert [(row.client, row.percentile) for row in rows] == [
        (client, percentile) for client in ("PidClient", "AsyncPidClient") for percentile in (50, 99)
    ]
    for row in rows:
        added = 1.0 if row.client == "PidClient" else 2.0
        assert (row.added_ms, row.low_ms, row.high_ms) == pytest.approx((added, added, added))
        assert row.httpx_ms == pytest.approx(row.client_ms - added)


@pytest.mark.slow
def test_a_short_run_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--small", "64", "--large", "1024", "--rounds", "4", "--large-rounds", "2"]
    main([*arguments, "--json", str(tmp_path / "report.json")])
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["rounds"] == {"64x64, raw": 4, "1024x1024, png": 2}
    assert len(document["overheads"]) == 8
    assert all(row["client_ms"] > 0 and row["httpx_ms"] > 0 for row in document["overheads"])
    size, peaks = document["image_mb"], document["peak_mb"]
    assert size > 3  # MB
    assert peaks["decode"] > size > 2 * max(peaks["stream"], peaks["decode_to_file"])
    assert "1024x1024, png" in capsys.readouterr().out
