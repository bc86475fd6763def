"""The lock on the output of a build: whatever the spelling of the path, only one build writes it at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from build_engines import main
from engines.bundle import open_bundle
from engines.compile import build as build_module
from engines.compile.lock import lock_output
from engines.errors import ConfigError
from tests.engines.compile.conftest import Build

HOLD = """
import sys
from pathlib import Path
from engines.compile.lock import lock_output
with lock_output(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def rejected(output: Path, capsys: pytest.CaptureFixture[str], path: Path) -> bool:
    """Return whether a build with this spelling of the output is rejected because another one is running."""
    arguments = ["--decoder", "tiny", "--random-weights", "--target", "cpu", "--overwrite", "--output", str(path)]
    status, last = main(arguments), capsys.readouterr().err.splitlines()[-1]
    return status == 2 and f"Another build with the output {output} is running" in last


@pytest.mark.usefixtures("build_tiny")
def test_a_second_build_with_the_same_output_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "bundles" / "out"
    output.parent.mkdir()
    (tmp_path / "link").symlink_to(output)
    (tmp_path / "folder").symlink_to(output.parent)
    monkeypatch.chdir(output.parent)
    spellings = (output, Path("out"), tmp_path / "x" / ".." / "bundles" / "out", tmp_path / "link")
    with lock_output(output):
        for path in (*spellings, tmp_path / "folder" / "out"):
            assert rejected(output, capsys, path), path
        assert not output.with_name("out.build").exists()
    assert not rejected(output, capsys, output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_build_that_is_running_cannot_be_resumed_or_overwritten(
    build_tiny: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Start other builds while the first one writes its weights."""
    make_weights = build_module.make_weights
    statuses: list[int] = []

    def start_others(*arguments):
        monkeypatch.setattr(build_module, "make_weights", make_weights)
        statuses.append(main(["--resume", str(tmp_path / "out.build")]))
        statuses.append(build_tiny("cpu", "--overwrite", "--seed", "5"))
        return make_weights(*arguments)

    monkeypatch.setattr(build_module, "make_weights", start_others)
    assert build_tiny("cpu", "--seed", "3") == 0
    assert statuses == [2, 2]
    assert capsys.readouterr().err.count("Another build with the output") == 2
    assert open_bundle(tmp_path / "out").manifest.origin.seed == 3


def test_builds_with_different_outputs_do_not_wait_for_each_other(build_tiny: Build, tmp_path: Path):
    with lock_output(tmp_path / "out2"), lock_output(tmp_path / "ou"):
        assert build_tiny("cpu") == 0


def test_a_killed_build_leaves_no_lock(tmp_path: Path):
    output = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="is running"), lock_output(output):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    with lock_output(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_deletes_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder ends between the moments when another build opens the lock file and when it locks it."""
    output, file = tmp_path / "out", tmp_path / ".out.lock"
    file.touch()
    opened: list[int] = []

    def open_before_deletion(*arguments) -> int:
        descriptor = os_open(*arguments)
        opened.append(descriptor)
        if len(opened) == 1:
            file.unlink()
        return descriptor

    os_open = os.open
    monkeypatch.setattr(os, "open", open_before_deletion)
    with lock_output(output):
        assert len(opened) == 2
        assert file.exists()


def test_the_lock_file_can_be_locked_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS locks the bytes of the file, for which its descriptor must be open for writing."""
    modes: list[int] = []

    def flock_of_nfs(descriptor: int, operation: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        if modes[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    with lock_output(tmp_path / "out"):
        assert modes == [os.O_RDWR]


def test_a_lock_file_that_cannot_be_created_is_an_error(tmp_path: Path):
    (tmp_path / ".out.lock").mkdir()
    with (
        pytest.raises(ConfigError, match=r"Cannot create the lock file .*/\.out\.lock: "),
        lock_output(tmp_path / "out"),
    ):
        pass
