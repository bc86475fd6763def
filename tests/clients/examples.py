"""Examples of the documents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.programs import ROOT


def examples(page: str, language: str) -> list[str]:
    """Return the examples of a page of docs/ in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def example(page: str, language: str, containing: str = "") -> str:
    """Return the only example in a language that contains a text."""
    (code,) = [block for block in examples(page, language) if containing in block]
    return code


def replace(code: str, **replacements: str) -> str:
    """Replace texts, which must occur."""
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    return code


def run_python(folder: Path, setup: str, code: str) -> None:
    (folder / "example.py").write_text(f"{setup}\n{code}")
    subprocess.run([sys.executable, "example.py"], cwd=folder, check=True, timeout=120)
