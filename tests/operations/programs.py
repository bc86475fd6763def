"""Programs that these tests run for real; one that is missing fails them with a sentence."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
SCRIPTS = Path(sys.executable).parent  # of Python packages


def program(name: str) -> str:
    """Where it is. Fails the test where it is not."""
    found = shutil.which(name, path=SCRIPTS) or shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        how = f"on Debian: apt-get install {PACKAGES[name]}" if name in PACKAGES else "pip install -e '.[operate]'"
        pytest.fail(f"{name} is not installed; {how}", pytrace=False)
    return found


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """What `command` says; fails the test with it unless the exit status is 0."""
    done = subprocess.run(
        [program(str(command[0])), *map(str, command[1:])], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`command` in the background, its output in `log`; ended with the block."""
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    """Wait for `condition`; the limit only ends a test that would hang."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
