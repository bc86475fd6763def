"""The packages that a rented machine may lack, as wheels that can be brought there without a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec

from engines.errors import ConfigError

PROJECT = "pid-decode-server"
PYTHON = "3.12"  # of the rented machine, unless --carry names another
TESTS = ("pytest", "hypothesis", "filelock")  # what the tests marked gpu need in addition
_PLATFORMS = ("2_28", "2_27", "2_17")  # versions of glibc; pip matches them exactly
_FOLDER = "wheels"


def carry_instructions(python: str = PYTHON, without: Sequence[str] = ()) -> str:
    """Return the commands that download the wheels here, for Linux on x86-64, and install them there.

    The packages are those that this project and its tests on a GPU need, in the versions that are installed here.
    PyTorch and what it needs are left out.

    Args:
        python: Version of Python on the rented machine.
        without: Further packages that the rented machine has.

    Raises:
        ConfigError: The packages of this environment cannot be read.
    """
    pinned = " ".join(f"{name}=={version(name)}" for name in packages_to_carry(python, without))
    platforms = " ".join(f"--platform manylinux_{glibc}_x86_64" for glibc in _PLATFORMS)
    return "\n".join(
        [
            "# here, where there is a network:",
            f"python -m pip download --no-deps --only-binary=:all: --implementation cp --python-version {python} "
            f"{platforms} --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest {_FOLDER} {pinned}",
            f"# there, in the root of the checkout, with the folder {_FOLDER}:",
            f"python3 -m pip install --quiet --no-index --no-deps --target /tmp/site {_FOLDER}/*.whl "
            "&& export PYTHONPATH=/tmp/site",
        ]
    )


def packages_to_carry(python: str, without: Iterable[str]) -> list[str]:
    """Return the names of the packages, each with everything that it needs.

    Raises:
        ConfigError: The packages of this environment cannot be read.
    """
    try:
        needed = _closure((PROJECT, *TESTS), python)
        present = _closure(("torch", "numpy", *without), python) if needed else set()
    except PackageNotFoundError as error:
        raise ConfigError(f"--carry reads the installed packages, but {error.name} is not installed.") from error
    kept = {"typing-extensions"}  # pydantic may need a newer one than PyTorch does
    return sorted(needed - (present - kept) - {PROJECT, "setuptools"})


def _closure(names: Iterable[str], python: str) -> set[str]:
    """Return the packages and everything that they need on Linux, by the metadata of this environment."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError as error:
        raise ConfigError(
            "--carry needs the package packaging; install it, or run it in the environment of make."
        ) from error
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(target):
                waiting.append(canonicalize_name(requirement.name))
    return found


def missing_packages(modules: Iterable[str]) -> list[str]:
    """Return those modules that cannot be imported here."""
    return [module for module in modules if find_spec(module) is None]
