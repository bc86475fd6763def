"""Torch-TensorRT as an installed package: the distribution that a target needs, and its version.

The two distributions both install the Python package `torch_tensorrt`. Each release works with one minor version of
PyTorch only.
"""

from __future__ import annotations

from importlib import metadata

import torch

from engines.errors import ConfigError
from engines.manifest import Package

_DISTRIBUTIONS: dict[Package, str] = {"tensorrt": "torch-tensorrt", "tensorrt-rtx": "torch-tensorrt-rtx"}
_OLDEST = (2, 13)


def distribution(package: Package) -> str:
    """Return the name of the distribution that works with a TensorRT package."""
    return _DISTRIBUTIONS[package]


def installed_version(package: Package) -> str:
    """Return the version of Torch-TensorRT for a TensorRT package, without importing it.

    Raises:
        ConfigError: It is not installed, does not match PyTorch, or was overwritten by the other distribution.
    """
    name, release = distribution(package), _release(torch.__version__)
    if release < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(f"{name} needs PyTorch {oldest} or newer, but PyTorch {torch.__version__} is installed.")
    version = _version(name)
    if version is None:
        raise ConfigError(f"{name} is not installed; run `{_install_command(package, release)}`.")
    if _release(version) != release:
        command = _install_command(package, release)
        raise ConfigError(f"{name} {version} does not match PyTorch {torch.__version__}; run `{command}`.")
    other = next(other for other in _DISTRIBUTIONS.values() if other != name)
    if _version(other) is not None:
        raise ConfigError(
            f"{name} and {other} are both installed, but contain the same files; run `pip uninstall --yes {name} "
            f"{other} && {_install_command(package, release)}`."
        )
    return version


def _install_command(package: Package, release: tuple[int, int]) -> str:
    """Return a command that installs the release for a minor version of PyTorch.

    For TensorRT for RTX, dependencies are not resolved: the package demands an older version of it than this project.
    """
    major, minor = release
    requirement = f"'{distribution(package)}=={major}.{minor}.*'"
    return f"pip install --no-deps {requirement} dllist" if package == "tensorrt-rtx" else f"pip install {requirement}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
