"""File descriptors: their limit, and those of the standard streams."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server.process.descriptors import descriptors_in_use


def run(code: str, limits: tuple[int, int] | None = None, shell: str = "") -> str:
    """Run Python code in a new process, optionally with limits of open files, or with redirections of a shell."""
    if limits is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n" + code
    command = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((256, 512), 512), ((512, 512), 512), ((256, 1_000_000), 65_536), ((70_000, 80_000), 70_000)],
)
def test_the_soft_limit_is_raised_to_the_hard_one_within_bounds(limits: tuple[int, int], expected: int):
    if limits[1] > int(run("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[1])")):
        pytest.skip("the hard limit of this machine is lower")
    code = (
        "from server.process.descriptors import raise_descriptor_limit\n"
        "print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert run(code, limits) == f"{expected} {expected} {limits[1]}"


def test_open_files_are_counted():
    before = descriptors_in_use()
    with open(__file__), open(__file__):
        assert descriptors_in_use() == before + 2


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_standard_stream(closed: str):
    code = (
        "import os, sys; from server.process.descriptors import open_standard_streams\n"
        "open_standard_streams(); sys.exit(os.open('/dev/null', os.O_RDONLY) < 3)"
    )
    assert run(code, shell=closed) == ""
