"""The packages that are brought to a machine without a network."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from engines.benchmark.gpu_check import __main__ as gpu_check
from engines.benchmark.gpu_check import carry
from engines.benchmark.gpu_check.carry import carry_instructions, missing_packages, packages_to_carry
from engines.errors import ConfigError

CONSTRAINTS = Path(__file__).parents[4] / "constraints.txt"


def pinned_versions() -> dict[str, str]:
    lines = (line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in lines}


def test_what_the_server_needs_is_carried_but_pytorch_is_not():
    packages = packages_to_carry("3.12", ())
    assert {"pydantic", "pydantic-core", "typing-extensions", "fastapi", "starlette", "uvicorn", "httptools"} <= set(
        packages
    )
    assert {"prometheus-client", "nvidia-ml-py", "psutil", "numba", "llvmlite", "pytest"} <= set(packages)
    assert not {"torch", "numpy", "sympy", "networkx", "pid-decode-server"} & set(packages)


def test_packages_that_the_machine_has_are_left_out_with_all_that_they_need():
    packages = packages_to_carry("3.12", ("numba", "pytest"))
    assert not {"numba", "llvmlite", "pytest", "pluggy", "iniconfig"} & set(packages)
    assert "pydantic" in packages


def test_packages_only_for_other_versions_of_python_are_not_carried():
    assert "exceptiongroup" not in packages_to_carry("3.12", ())  # a backport for Python 3.10


def test_the_command_downloads_the_versions_that_are_installed_here():
    download = carry_instructions("3.12").splitlines()[1]
    assert download.startswith("python -m pip download --no-deps --only-binary=:all: ")
    assert "--python-version 3.12 " in download
    named = dict(word.split("==") for word in download.split() if "==" in word)
    assert named == {name: version(name) for name in packages_to_carry("3.12", ())}


def test_the_pinned_versions_are_carried():
    """Holds in an environment that `make` has created."""
    pinned = pinned_versions()
    assert {name: version(name) for name in packages_to_carry("3.12", ())}.items() <= pinned.items()


def test_the_command_line_prints_the_instructions(capsys):
    assert gpu_check.main(["--carry", "3.13", "--without", "numba"]) == 0
    printed = capsys.readouterr().out
    assert "--python-version 3.13 " in printed
    assert "numba" not in printed


def test_an_unknown_package_is_one_message(capsys):
    assert gpu_check.main(["--carry", "--without", "no-such-package"]) == 2
    assert "no-such-package is not installed" in capsys.readouterr().err


def test_without_the_metadata_of_the_project_nothing_can_be_carried(monkeypatch):
    monkeypatch.setattr(carry, "PROJECT", "no-such-project")
    with pytest.raises(ConfigError, match="no-such-project"):
        packages_to_carry("3.12", ())


def test_missing_modules_are_found():
    assert missing_packages(("json", "no_such_module")) == ["no_such_module"]
