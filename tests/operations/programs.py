"""Run the real programs that these tests need; a missing one fails the test with installation instructions."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "kubectl": "kubernetes-client",
    "nginx": "nginx-light",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "umount": "mount",
    "unshare": "util-linux",
}
SCRIPTS = Path(sys.executable).parent  # programs installed by Python packages


def program(name: str) -> str:
    """Return the path of a program; fail the test if it is not installed."""
    found = shutil.which(name, path=SCRIPTS) or shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        install = f"on Debian, apt-get install {PACKAGES[name]}" if name in PACKAGES else "pip install -e '.[operate]'"
        pytest.fail(f"{name} is not installed; install it: {install}", pytrace=False)
    return found


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """Return the stdout of `command`; fail the test with its output if the exit status is not 0."""
    completed = subprocess.run(
        [program(str(command[0])), *map(str, command[1:])], cwd=folder, capture_output=True, text=True
    )
    if completed.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{completed.stdout}{completed.stderr}", pytrace=False)
    return completed.stdout


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` in the background with its output in `log`; terminate it when the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
