"""Calls and runs of docker/fetch_bundle.py for its tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from docker.fetch_bundle import FetchError, Source, fetch
from tests.operations.archive_server import Server, sha256
from tests.programs import ROOT


def source_of(server: Server) -> Source:
    return Source(server.url, sha256(server.content))


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a fetched bundle, without hidden ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def fetching(source: Source, folder: Path, **options: Callable[..., object]) -> list[float]:
    """Fetch without waiting; return the pauses."""
    pauses: list[float] = []
    assert fetch(source, folder, **{"pause": pauses.append, **options})  # type: ignore[arg-type]
    return pauses


def failing(source: Source, folder: Path, **options: Callable[..., object]) -> FetchError:
    """Fetch, which must fail and leave nothing behind, except for a part that the next call continues."""
    work = folder.parent / f".{folder.name}.fetch"
    before = {*folder.parent.rglob("*")}
    with pytest.raises(FetchError) as caught:
        fetching(source, folder, **options)
    part = {work, work / source.sha256} if caught.value.retryable else set()
    assert {*folder.parent.rglob("*")} == before | part
    assert "\n" not in str(caught.value)
    return caught.value


def program(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "docker/fetch_bundle.py"), *map(str, arguments)]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program with only these environment variables."""
    return subprocess.run(program(*arguments), capture_output=True, text=True, env=environment, timeout=60)
