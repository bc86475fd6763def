"""Engines compiled by an installed TensorRT package for the GPU of this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.bundle import open_bundle, write_bundle
from engines.compile.compile_engine import EngineShapes, compile_engine
from engines.compile.export import export, file_name
from engines.compile.planning.targets import Target
from engines.errors import ConfigError
from engines.machine import driver_version
from engines.pid import FoldedDecoder
from engines.pid.graphs import GRAPHS
from engines.runtime.tensorrt_runtime import TensorRTBackend, open_engines
from engines.runtime.trt import TensorRT, import_package
from engines.size import Size
from engines.size_profiles import size_profiles
from tests.conftest import BuildOnce
from tests.fakecuda.control import on_fake_device
from tests.tiny import manifest

PACKAGES = ("tensorrt", "tensorrt-rtx")
CAPTION_TOKENS, MAX_BATCH = 5, 3


def real_backend(
    package: str, decoder: FoldedDecoder, sizes: tuple[Size, ...], build_once: BuildOnce
) -> TensorRTBackend:
    """Compile engines of a decoder, always the same one per test session, and load them.

    Skips the test if the package is not installed or cannot compile for this GPU.
    """
    if on_fake_device():
        pytest.skip("TensorRT needs a real GPU")
    try:
        tensorrt = import_package(package)
    except ConfigError as error:
        pytest.skip(str(error))
    major, minor = torch.cuda.get_device_capability()
    if package == "tensorrt-rtx" and not hasattr(tensorrt.module.ComputeCapability, f"SM{major}{minor}"):
        pytest.skip(f"{package} does not compile for compute capability {major}.{minor}")
    build = partial(_build_bundle, tensorrt, decoder, sizes, (major, minor))
    return open_engines(open_bundle(build_once(f"{package}-engines", build) / "bundle"), torch.device("cuda"))


def _build_bundle(
    tensorrt: TensorRT, decoder: FoldedDecoder, sizes: tuple[Size, ...], capability: tuple[int, int], directory: Path
) -> None:
    target = Target("here", ("fp32",), (tensorrt.package,), compute_capability=capability)
    shapes = EngineShapes(decoder.config, CAPTION_TOKENS, size_profiles(sizes, None), MAX_BATCH)
    for graph in GRAPHS:
        export(decoder, graph, max(sizes), CAPTION_TOKENS, MAX_BATCH, directory)
        compile_engine(tensorrt, target, graph, shapes, directory, directory / "timings")
    description = manifest(
        network=decoder.config,
        sizes=sizes,
        max_batch=MAX_BATCH,
        runtime={
            "kind": "tensorrt",
            "package": tensorrt.package,
            "version": tensorrt.version,
            "compute_capability": capability,
            "driver": driver_version(),
        },
        engines=[{"graph": graph, "file": file_name(graph, ".engine")} for graph in GRAPHS],
    )
    names = [file_name(graph, ".engine") for graph in GRAPHS]
    files = {name: lambda path, name=name: path.write_bytes((directory / name).read_bytes()) for name in names}
    caption = {"caption": torch.zeros(CAPTION_TOKENS, decoder.config.caption_width)}
    files["caption.safetensors"] = lambda path: save_file(caption, path)
    write_bundle(directory / "bundle", description, files)
