"""The benchmark of previews: a short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.benchmarks.previews import main


@pytest.mark.slow
def test_a_short_run_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--table", "zero", "--rounds", "2", "--json", str(tmp_path / "report.json")])
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["size"], document["rounds"]) == ("2048x2048", 2)
    kinds = document["kinds"]
    assert kinds["none"]["first_preview_ms"] is None
    for name in ("multipart", "events"):
        assert 0 < kinds[name]["first_preview_ms"] <= kinds[name]["total_ms"]
    assert "2 requests of each kind for 2048x2048" in capsys.readouterr().out
