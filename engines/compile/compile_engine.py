"""ONNX to a TensorRT engine, by whichever TensorRT it is."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from engines.compile.export import file_name
from engines.compile.results import EngineResult
from engines.compile.targets import Target
from engines.errors import PidError
from engines.manifest import Graph
from engines.runtime.trt import TensorRT
from engines.size import Size


class CompileError(PidError):
    """TensorRT did not make an engine of a graph."""

    code = "compile-failed"


def compile_engine(
    compiler: TensorRT, target: Target, graph: Graph, size: Size, max_batch: int, folder: Path, timings: Path
) -> EngineResult:
    """Compile `folder`'s ONNX file of a graph into an engine beside it, for batches of 1 to max_batch.

    `timings` holds what earlier builds measured of kernels, and is added to where the compiler measures any.
    """
    began = time.monotonic()
    module = compiler.module
    builder = module.Builder(compiler.logger)
    network = builder.create_network(_flags(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))
    source = folder / file_name(graph, size, ".onnx")
    parser = module.OnnxParser(network, compiler.logger)
    if not parser.parse_from_file(os.fspath(source)):
        first = parser.get_error(0).desc() if parser.num_errors else compiler.last_error
        raise CompileError(f"{compiler.package} {compiler.version} does not take {source.name}: {first.rstrip('.')}.")
    config = builder.create_builder_config()
    # Layer by layer what became of the graph: which attention kernel was picked is looked up there.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # a stream capture allows no allocation
    if compiler.package == "tensorrt-rtx":
        _aim(config, module, target)
    config.add_optimization_profile(_profile(builder, network, max_batch))
    cache = _attach_timings(config, timings) if compiler.package == "tensorrt" else None
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CompileError(f"{compiler.package} {compiler.version} made no engine of {source.name}: "
                           f"{compiler.last_error}")  # fmt: skip
    result = folder / file_name(graph, size, ".engine")
    with result.open("wb") as file:
        file.write(memoryview(engine))
    if cache is not None:
        with contextlib.suppress(OSError):  # a build without it is slower, not worse
            timings.parent.mkdir(parents=True, exist_ok=True)
            timings.write_bytes(memoryview(cache.serialize()))
    return EngineResult(graph=graph, size=size, bytes=result.stat().st_size, seconds=time.monotonic() - began)


def _flags(flags: Any, *names: str) -> int:
    """Bits of those flags that this version still has: TensorRT 11 knows no other networks than strongly typed ones."""
    return sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name))


def _aim(config: Any, module: Any, target: Target) -> None:
    assert target.compute_capability is not None  # noqa: S101  every compiled target has one
    major, minor = target.compute_capability
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(module.ComputeCapability, f"SM{major}{minor}"), 0)


def _profile(builder: Any, network: Any, max_batch: int) -> Any:
    """One image is the common case, so kernels are picked for it."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        if tensor.shape[0] == -1:
            profile.set_shape(tensor.name, (1, *rest), (1, *rest), (max_batch, *rest))
    return profile


def _attach_timings(config: Any, timings: Path) -> Any:
    content = timings.read_bytes() if timings.is_file() else b""
    cache = config.create_timing_cache(content)
    # False: those of another version or GPU are refused, and an empty cache is begun.
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
