"""The software bill of materials that docker/sbom.sh writes, as tests read it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.programs import ROOT, program


def make_sbom(source: str, file: Path) -> dict[str, Any]:
    """Write the SBOM of an image to `file`, check it against the schema of CycloneDX, and return its content."""
    environment = {**os.environ, "PATH": f"{Path(program('syft')).parent}:{os.environ['PATH']}"}
    made = subprocess.run([ROOT / "docker/sbom.sh", source, file], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    text = file.read_text()
    sbom: dict[str, Any] = json.loads(text)
    problem = JsonStrictValidator(SchemaVersion.from_version(sbom["specVersion"])).validate_str(text)
    assert problem is None, problem
    return sbom


def packages(sbom: dict[str, Any], kind: str) -> dict[str, str]:
    """Return the versions of all packages of a kind, "deb" or "pypi", by name."""
    found = [item for item in sbom["components"] if item.get("purl", "").startswith(f"pkg:{kind}/")]
    return {item["name"]: item["version"] for item in found}
