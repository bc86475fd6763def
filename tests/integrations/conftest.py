"""The ComfyUI package, loaded without ComfyUI."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

COMFYUI_NODES = Path(__file__).parents[2] / "integrations/comfyui"


def load_package(custom_nodes: Path) -> ModuleType:
    """Import the package as ComfyUI does, from a folder of any name. The module is named after the path."""
    folder = custom_nodes / "my nodes.v1"
    shutil.copytree(COMFYUI_NODES, folder)
    name = str(folder).replace(".", "_x_")
    specification = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load_package(tmp_path_factory.mktemp("custom_nodes"))


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of ComfyUI that nodes call; `progress` is what they report, `interrupted` cancels them."""
    state = SimpleNamespace(progress=[], interrupted=False)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            state.progress.append(f"of {total}")

        def update(self, value: int) -> None:
            state.progress.append(value)

    def throw_exception_if_processing_interrupted() -> None:
        if state.interrupted:
            raise InterruptedError

    utils, model_management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    vars(utils).update(ProgressBar=ProgressBar)
    vars(model_management).update(throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted)
    for module in (ModuleType("comfy"), utils, model_management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state
