"""Fixtures that run programs on the fake CUDA device. All tests here are marked `rehearsal`; see CONTRIBUTING.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakecuda.control import on_fake_device
from tests.rehearsal.programs import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _needs_the_fake_device() -> None:
    if not on_fake_device():
        pytest.skip("needs the fake CUDA device; run `make rehearse`")


@dataclass
class Device:
    """A fake device with its own log."""

    log_file: Path

    def environment(self, **settings: object) -> dict[str, str]:
        """Return the environment of a child process; settings are those of tests/fakecuda/README.md, in lower case."""
        variables = {f"FAKECUDA_{name.upper()}": str(value) for name, value in settings.items()}
        return {**os.environ, **variables, "FAKECUDA_LOG": str(self.log_file)}

    def log(self, kind: str) -> list[str]:
        """Return the entries of one kind: violation, graph, note or error."""
        text = self.log_file.read_text() if self.log_file.exists() else ""
        return re.findall(rf"^fakecuda {kind}: (.*)$", text, re.MULTILINE)

    def python(self, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
        """Run Python to its end and return the process with its output."""
        command = [sys.executable, *arguments]
        environment = self.environment(**settings)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def run(self, program: Callable[..., Result], settings: dict[str, object], **arguments: object) -> Result:
        """Run one of `programs` in a process and return its result."""
        name = program.__name__
        process = self.python("-m", "tests.rehearsal.programs", name, json.dumps(arguments), **settings)
        assert process.returncode == 0, process.stderr[-4000:]
        return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "fakecuda.log")
