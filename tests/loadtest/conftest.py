"""Shared fixtures of the load test's tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def small_table(tmp_path: Path) -> Path:
    """Cost table of a fast device that decodes 64x64."""
    costs = {"64x64": {"condition": 0.001, "step": 0.005, "finish": 0.001}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"name": "small", "source": "", "costs": costs}))
    return path
