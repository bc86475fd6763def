"""Versions of Torch-TensorRT that cannot be used are rejected with a command that installs the right one."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from engines.compile.planning.torch_tensorrt_package import distribution, installed_version
from engines.errors import ConfigError

FULL, RTX = "torch-tensorrt", "torch-tensorrt-rtx"
INSTALL = {
    FULL: "run `pip install 'torch-tensorrt==2.13.*'`",
    RTX: "run `pip install --no-deps 'torch-tensorrt-rtx==2.13.*' dllist`",
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distributions that are installed, with their versions, next to PyTorch 2.13."""
    distributions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    return distributions


@pytest.mark.parametrize(("package", "name"), [("tensorrt", FULL), ("tensorrt-rtx", RTX)])
class TestInstalledVersion:
    def test_the_release_for_this_pytorch_is_found(self, installed: dict[str, str], package, name: str):
        installed[name] = "2.13.1"
        assert distribution(package) == name
        assert installed_version(package) == "2.13.1"

    def test_a_missing_package_is_named_with_the_command_that_installs_it(
        self, installed: dict[str, str], package, name: str
    ):
        with pytest.raises(ConfigError) as caught:
            installed_version(package)
        assert str(caught.value) == f"{name} is not installed; {INSTALL[name]}."

    @pytest.mark.parametrize("version", ["2.12.1", "2.14.0", "1.13.0"])
    def test_a_release_for_another_pytorch_is_rejected(
        self, installed: dict[str, str], package, name: str, version: str
    ):
        installed[name] = version
        with pytest.raises(ConfigError) as caught:
            installed_version(package)
        assert str(caught.value) == f"{name} {version} does not match PyTorch 2.13.0+cu130; {INSTALL[name]}."

    def test_the_other_distribution_must_not_be_installed_too(self, installed: dict[str, str], package, name: str):
        installed.update({FULL: "2.13.0", RTX: "2.13.0"})
        with pytest.raises(ConfigError, match="contain the same files; run `pip uninstall --yes torch-tensorrt"):
            installed_version(package)

    def test_an_older_pytorch_is_not_supported(
        self, installed: dict[str, str], package, name: str, monkeypatch: pytest.MonkeyPatch
    ):
        installed[name] = "2.11.0"
        monkeypatch.setattr(torch, "__version__", "2.11.0")
        with pytest.raises(
            ConfigError, match=rf"{name} needs PyTorch 2\.13 or newer, but PyTorch 2\.11\.0 is installed"
        ):
            installed_version(package)
