"""Compiles an ONNX graph to an engine with TensorRT or TensorRT for RTX: one engine for all sizes and batches."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.bundle import writing
from engines.compile.attention import explain_missing_kernel, prepare_attentions
from engines.compile.export import file_name
from engines.compile.fp4_products import check_fp4_products, find_fp4_products, read_fp4_products
from engines.compile.interrupts import deferred
from engines.compile.kernel_records import check_kernels, read_kernel_records
from engines.compile.planning.targets import Target
from engines.compile.programs import Program
from engines.compile.results import EngineResult
from engines.compile.torch_tensorrt_network import NetworkDefinition, define_network
from engines.errors import PidError
from engines.pid.config import PidConfig
from engines.pid.graphs import Graph, tensor_specs
from engines.runtime.trt import TensorRT
from engines.size_profiles import SizeProfile


class CompileError(PidError):
    """TensorRT could not compile a graph."""

    code = "compile-failed"


Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input -> smallest, best, largest


@dataclass(frozen=True)
class EngineShapes:
    """The shapes that the engines of a network support."""

    config: PidConfig
    caption_tokens: int
    profiles: Sequence[SizeProfile]
    max_batch: int  # a step engine supports batches of 1 to `max_batch`, a condition engine one image

    def of(self, graph: Graph, profile: SizeProfile) -> Shapes:
        """Return the shapes of a graph's inputs for one optimisation profile.

        Kernels are chosen for a single image: of the profile's only size, or in a range of sizes of the first of the
        other profiles that is within the range.
        """
        best = next((other.largest for other in self.profiles if profile.covers(other.largest)), profile.largest)
        smallest, middle, largest = (
            tensor_specs(graph, self.config, torch.float32, size, self.caption_tokens, batch)
            for size, batch in ((profile.smallest, 1), (best, 1), (profile.largest, self.max_batch))
        )
        return {
            name: (spec.shape, middle[name].shape, largest[name].shape) for name, spec in smallest.items() if spec.input
        }


def compile_engine(
    compiler: TensorRT,
    target: Target,
    graph: Graph,
    shapes: EngineShapes,
    folder: Path,
    timings: Path,
    program: Program | None = None,
) -> EngineResult:
    """Compile a graph to an engine with one optimisation profile per size; the weights are stored once.

    Args:
        compiler: The package to use.
        target: The GPU to compile for.
        graph: Which graph.
        shapes: The shapes to support.
        folder: Directory of the ONNX file, which the engine is written to.
        timings: File with TensorRT's kernel timings, reused between builds. TensorRT for RTX does not use it.
        program: The graph, which Torch-TensorRT converts; None: the ONNX file is parsed.

    Raises:
        ConversionError: Torch-TensorRT rejects the graph.
        CompileError: TensorRT rejects the graph; the message contains its reason.
        AttentionError: An attention cannot be, or was not, compiled in the precision that it has in the graph.
        ProductError: A matrix product was not compiled in FP4, as it is in the graph.
        BundleError: The engine cannot be written.
    """
    start = time.monotonic()
    if program is None:
        definition = _parse(compiler, folder / file_name(graph, ".onnx"))
    else:
        definition = define_network(compiler, program)
    builder, network = definition.builder, definition.network
    # TensorRT reads constants of the attentions until the engine has been built.
    attentions = prepare_attentions(compiler.module, network)
    products = find_fp4_products(compiler.module, network)
    config = _configure(compiler, target, builder)
    for profile in shapes.profiles:
        config.add_optimization_profile(_profile(builder, network, shapes.of(graph, profile)))
    cache = _attach_timings(config, timings) if compiler.package == "tensorrt" else None
    with deferred():
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = explain_missing_kernel(compiler.last_error, attentions.requested) or compiler.last_error
        raise CompileError(f"{compiler.package} {compiler.version} could not compile the {graph} graph: {reason}")
    path = folder / file_name(graph, ".engine")
    with writing(path), path.open("wb") as file:
        file.write(memoryview(engine))
    if cache is not None:
        _save_timings(cache, timings, folder)
    records = read_kernel_records(path)
    profiles = len(shapes.profiles)
    return EngineResult(
        graph=graph,
        bytes=path.stat().st_size,
        seconds=time.monotonic() - start,
        attentions=check_kernels(attentions.requested, records, profiles, compiler.package),
        fp4_products=check_fp4_products(
            products, read_fp4_products(path) if products else (), profiles, compiler.package
        ),
    )


def _parse(compiler: TensorRT, source: Path) -> NetworkDefinition:
    module = compiler.module
    builder = module.Builder(compiler.logger)
    network = builder.create_network(_flags(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))
    parser = module.OnnxParser(network, compiler.logger)
    with deferred():  # TensorRT logs through Python and prints the traceback of an exception there
        parsed = parser.parse_from_file(os.fspath(source))
    if not parsed:
        reason = parser.get_error(0).desc() if parser.num_errors else compiler.last_error
        raise CompileError(f"{compiler.package} {compiler.version} rejects {source.name}: {reason.rstrip('.')}.")
    return NetworkDefinition(builder, network, weights=parser)


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


def _profile(builder: Any, network: Any, shapes: Shapes) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *shapes[tensor.name])
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
