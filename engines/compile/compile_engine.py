"""Compiles an ONNX graph to an engine with TensorRT or TensorRT for RTX."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from engines.bundle import writing
from engines.compile.export import file_name
from engines.compile.interrupts import deferred
from engines.compile.planning.targets import Target
from engines.compile.results import EngineResult
from engines.errors import PidError
from engines.manifest import Graph
from engines.runtime.trt import TensorRT
from engines.size import Size


class CompileError(PidError):
    """TensorRT could not compile a graph."""

    code = "compile-failed"


def compile_engine(
    compiler: TensorRT, target: Target, graph: Graph, size: Size, max_batch: int, folder: Path, timings: Path
) -> EngineResult:
    """Compile a graph to an engine.

    Args:
        compiler: The package to use.
        target: The GPU to compile for.
        graph: Which graph.
        size: Its output size.
        max_batch: A step engine supports batches of 1 to `max_batch`.
        folder: Directory of the ONNX file, which the engine is written to.
        timings: File with TensorRT's kernel timings, reused between builds. TensorRT for RTX does not use it.

    Raises:
        CompileError: TensorRT rejects the graph; the message contains its reason.
        BundleError: The engine cannot be written.
    """
    start = time.monotonic()
    module = compiler.module
    builder = module.Builder(compiler.logger)
    network = builder.create_network(_flags(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))
    source = folder / file_name(graph, size, ".onnx")
    parser = module.OnnxParser(network, compiler.logger)
    with deferred():  # TensorRT logs through Python and prints the traceback of an exception there
        parsed = parser.parse_from_file(os.fspath(source))
    if not parsed:
        reason = parser.get_error(0).desc() if parser.num_errors else compiler.last_error
        raise CompileError(f"{compiler.package} {compiler.version} rejects {source.name}: {reason.rstrip('.')}.")
    config = _configure(compiler, target, builder)
    config.add_optimization_profile(_profile(builder, network, max_batch))
    cache = _attach_timings(config, timings) if compiler.package == "tensorrt" else None
    with deferred():
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CompileError(
            f"{compiler.package} {compiler.version} could not compile {source.name}: {compiler.last_error}"
        )
    path = folder / file_name(graph, size, ".engine")
    with writing(path), path.open("wb") as file:
        file.write(memoryview(engine))
    if cache is not None:
        _save_timings(cache, timings, folder)
    return EngineResult(graph=graph, size=size, bytes=path.stat().st_size, seconds=time.monotonic() - start)


def _configure(compiler: TensorRT, target: Target, builder: Any) -> Any:
    module = compiler.module
    config = builder.create_builder_config()
    # Store layer information in the engine, which shows the attention kernel that was chosen.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # CUDA graph capture allows no allocation
    if compiler.package == "tensorrt-rtx":
        _set_compute_capability(config, module, target)
    return config


def _flags(flags: Any, *names: str) -> int:
    """Combine those flags that this version has: TensorRT 11 networks are always strongly typed."""
    return sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name))


def _set_compute_capability(config: Any, module: Any, target: Target) -> None:
    assert target.compute_capability is not None  # noqa: S101  for mypy: every compiled target has one
    major, minor = target.compute_capability
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(module.ComputeCapability, f"SM{major}{minor}"), 0)


def _profile(builder: Any, network: Any, max_batch: int) -> Any:
    """Make an optimisation profile for batches of 1 to `max_batch`; kernels are chosen for a single image."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        if tensor.shape[0] == -1:
            profile.set_shape(tensor.name, (1, *rest), (1, *rest), (max_batch, *rest))
    return profile


def _attach_timings(config: Any, timings: Path) -> Any:
    content = b""
    with contextlib.suppress(OSError):  # without the file, the build is only slower
        content = timings.read_bytes()
    cache = config.create_timing_cache(content)
    # False: reject timings of another version or GPU, and damaged ones. In that case start with an empty cache.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _save_timings(cache: Any, timings: Path, folder: Path) -> None:
    """Replace the file atomically, by way of `folder`, since builds of other bundles may be reading it."""
    partial = folder / f".{timings.name}"
    with contextlib.suppress(OSError):  # without the file, later builds are only slower
        try:
            partial.write_bytes(memoryview(cache.serialize()))
            timings.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(timings)
        finally:
            partial.unlink(missing_ok=True)
