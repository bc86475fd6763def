"""What documents point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_test_that_the_threat_table_names_exists():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text())
    assert len(named) > 25
    assert not [name for name in named if f"def {name}(" not in TESTS]


def test_settings_that_documents_name_exist():
    from server.settings import Settings

    flags = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for name in ("operations.md", "security.md"):
        text = (ROOT / "docs" / name).read_text()
        ours = re.findall(r"`(--(?!target|profile|time|scenario)[a-z-]+)", text)
        assert set(ours) <= flags, name
