"""docs/clients.md has the versions of the packages that are tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
DOCUMENT = (FOLDER.parents[1] / "docs/clients.md").read_text()
VERSIONS = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", (FOLDER / "requirements.txt").read_text(), re.MULTILINE))
VERSIONS |= json.loads((FOLDER / "package.json").read_text())["dependencies"]


@pytest.mark.parametrize(
    ("client", "package"),
    [
        ("diffusers, ", "diffusers"),
        ("`pid_client` with diffusers", "diffusers"),
        ("tritonclient", "tritonclient"),
        ("JAX, ", "jax"),
        ("openapi-python-client", "openapi-python-client"),
        ("Redocly", "@redocly/cli"),
        ("Spectral", "@stoplight/spectral-cli"),
        ("Playwright, ", "playwright"),
        ("axe-core, ", "axe-core"),
    ],
)
def test_the_version_of_a_package_is_the_tested_one(client: str, package: str):
    (row,) = re.findall(rf"^\| {client}[^|]*\| ([^|]+) \|", DOCUMENT, re.MULTILINE)
    assert row == VERSIONS[package]
