"""The ComfyUI package, loaded without ComfyUI."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL.Image import Image

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
    """The functions of ComfyUI that nodes call; `progress` and `previews` are what they show.

    `interrupted` cancels them. `on_preview` is called for each preview.
    """
    state = SimpleNamespace(total=0, progress=[], previews=[], interrupted=False, on_preview=lambda: None)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            state.total = total

        def update_absolute(
            self, value: float, total: int | None = None, preview: tuple[str, Image, int | None] | None = None
        ) -> None:
            state.progress.append(value)
            if preview is not None:
                state.previews.append(preview)
                state.on_preview()

    def throw_exception_if_processing_interrupted() -> None:
        if state.interrupted:
            raise InterruptedError

    utils, model_management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    vars(utils).update(ProgressBar=ProgressBar)
    vars(model_management).update(throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted)
    for module in (ModuleType("comfy"), utils, model_management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state


@pytest.fixture
def call(package: ModuleType, comfy: SimpleNamespace) -> Callable[..., tuple[Any, ...]]:
    """Return a function that calls a node as ComfyUI does: `call("PidDecode", samples=…)`."""

    def run(name: str, **inputs: object) -> tuple[Any, ...]:
        node = package.NODE_CLASS_MAPPINGS[name]
        with torch.inference_mode():
            outputs: tuple[Any, ...] = getattr(node(), node.FUNCTION)(**inputs)
        assert len(outputs) == len(node.RETURN_TYPES)
        return outputs

    return run
