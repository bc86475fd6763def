"""Run real programs; a missing one fails the test with installation instructions."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "kubectl": "kubernetes-client",
    "nginx": "nginx-light",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "podman": "podman runc netavark aardvark-dns iptables",
    "ip": "iproute2",
    "mount": "mount",
    "umount": "mount",
    "curl": "curl",
    "node": "nodejs",
    "java": "default-jdk-headless",
    "chromium": "chromium",
}
SCRIPTS = Path(sys.executable).parent  # programs installed by Python packages
NODE_SCRIPTS = ROOT / "build/clients/node/node_modules/.bin"  # and by those of Node.js, in `make test-clients`
HELM_FOLDER = ROOT / "build/helm"  # if Helm is not installed, in `make test-operations`
_MAKE = "make test-operations or make test-clients"


def program(name: str) -> str:
    """Return the path of a program; fail the test if it is not installed."""
    search = (SCRIPTS, NODE_SCRIPTS, None, "/usr/sbin:/sbin", HELM_FOLDER)  # None: PATH
    found = next((path for folder in search if (path := shutil.which(name, path=folder))), None)
    if found is None:
        debian = f"On Debian, install it with: apt-get install {PACKAGES[name]}" if name in PACKAGES else ""
        pytest.fail(f"{name} is not installed. {debian or f'{_MAKE} installs it.'}", pytrace=False)
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
