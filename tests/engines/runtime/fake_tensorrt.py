"""Fake TensorRT whose engines compute with PyTorch on the CPU, on memory given by raw addresses.

Like the real one it overwrites its activation memory in every run, returns False or None instead of raising, uses only
the memory that it was given, and accepts only the shapes of the selected optimisation profile.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.bundle import DTYPES as NETWORK_DTYPES
from engines.bundle import Bundle, write_bundle
from engines.compile.compile_engine import EngineShapes
from engines.manifest import Manifest, Package
from engines.pid import FoldedDecoder, graphs
from engines.pid.graphs import GRAPHS, ConditionGraph, Graph, StepGraph, varying_specs
from engines.runtime.trt import TensorRT
from tests.tiny import manifest

VERSION = "1.7.1.116"
DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64", "FP4"])
Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
Strategy = Enum("Strategy", ["STATIC", "USER_MANAGED"])
Specialization = Enum("Specialization", ["LAZY", "EAGER"])
DTYPES = {torch.float32: DataType.FLOAT, torch.bfloat16: DataType.BF16, torch.int64: DataType.INT64}


class FakeModule:
    """Replacement for the module of the package."""

    __version__ = VERSION
    TensorIOMode, ExecutionContextAllocationStrategy = TensorIOMode, Strategy
    DynamicShapesKernelSpecializationStrategy = Specialization
    LayerInformationFormat = Enum("LayerInformationFormat", ["JSON"])

    class ILogger:
        pass

    def __init__(self, decoder: FoldedDecoder) -> None:
        self.decoder = decoder
        self.contexts: list[FakeContext] = []
        self.cache_contents: list[bytes] = []  # kernel caches that were read from a file
        self.compiled = 0  # contexts whose kernels were not in the cache

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802  the name in TensorRT
        return FakeRuntime(self, logger)


class FakeRuntime:
    """Deserialises engines, which are JSON plans."""

    def __init__(self, module: FakeModule, logger: Any) -> None:
        self.module, self.logger = module, logger

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
        try:
            plan = json.loads(content)
        except ValueError:
            self.logger.log(Severity.ERROR, "Magic tag does not match.")
            return None
        return FakeEngine(self.module, plan)


class FakeEngine:
    """Engine of a plan, which has the graph, its caption tokens, its tensors and its optimisation profiles.

    Tensors are name -> [mode, data type, shape], profiles are input -> [smallest, best, largest shape].
    """

    def __init__(self, module: FakeModule, plan: dict[str, Any]) -> None:
        self.module, self.plan = module, plan
        self.num_io_tensors = len(plan["tensors"])
        self.num_optimization_profiles = len(plan["profiles"])
        condition = plan["graph"] == "condition"
        self.graph = ConditionGraph(module.decoder) if condition else StepGraph(module.decoder, plan["caption_tokens"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.plan["tensors"])[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self.plan["tensors"][name][0]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.plan["tensors"][name][1]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.plan["tensors"][name][2]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.plan["profiles"][profile][name]

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.module)

    def create_execution_context(self, argument: Any) -> FakeContext:
        if isinstance(argument, FakeRuntimeConfig):
            assert argument.strategy is Strategy.USER_MANAGED
            assert argument.dynamic_shapes_kernel_specialization_strategy is Specialization.EAGER
            context = FakeContext(self, argument.cache)
        else:
            assert argument is Strategy.USER_MANAGED
            context = FakeContext(self, None)
        self.module.contexts.append(context)
        return context

    def create_engine_inspector(self) -> FakeEngine:
        return self

    def get_engine_information(self, form: Enum) -> str:
        return json.dumps({"Layers": [self.plan["graph"]]})


class FakeRuntimeConfig:
    """Options of an execution context."""

    def __init__(self, module: FakeModule) -> None:
        self.module = module
        self.strategy: Strategy | None = None
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self.module)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """Kernel cache whose content is the TensorRT version, followed by the names of the kernels."""

    def __init__(self, module: FakeModule) -> None:
        self.module = module
        self.kernels: set[str] = set()

    def compile(self, kernel: str) -> None:
        self.module.compiled += kernel not in self.kernels
        self.kernels.add(kernel)

    def serialize(self) -> bytearray:
        return bytearray(json.dumps([VERSION, *sorted(self.kernels)]).encode())

    def deserialize(self, content: bytes) -> bool:
        try:
            version, *kernels = json.loads(content)
        except ValueError:
            return False
        if version == VERSION:
            self.kernels = set(kernels)
            self.module.cache_contents.append(content)
        return version == VERSION


class FakeContext:
    """Execution context, which reads and writes the addresses that were set."""

    def __init__(self, engine: FakeEngine, cache: FakeRuntimeCache | None) -> None:
        self.engine, self.cache = engine, cache
        self.profile: int | None = None
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert address % 256 == 0
        assert nbytes >= self._memory_bytes
        self.memory = address, nbytes

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        self.shapes[name] = shape
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self.profile)
        return all(low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True))

    def infer_shapes(self) -> list[str]:
        inputs = (name for name, tensor in self.engine.plan["tensors"].items() if tensor[0] == "INPUT")
        return [name for name in inputs if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        _, *image = self._image_shape
        if self.cache is not None:
            self.cache.compile(f"{self.engine.plan['graph']} {image}")
        return self._memory_bytes

    @property
    def _image_shape(self) -> tuple[int, ...]:
        """Shape of the latent or of x."""
        return self.shapes[graphs.LATENT if self.engine.plan["graph"] == "condition" else graphs.X]

    @property
    def _memory_bytes(self) -> int:
        """Activation memory that the shapes need."""
        return 1000 + torch.Size(self._image_shape).numel() + 7

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        tensors = self.engine.plan["tensors"]
        if self.memory is None or set(self.addresses) != set(tensors):
            return False
        ctypes.memset(self.memory[0], 0xFF, self.memory[1])
        values = {name: self._tensor(name) for name in tensors}
        if self.engine.plan["graph"] == "condition":
            outputs = self.engine.graph(values[graphs.LATENT], values[graphs.CAPTION])
            names = [graphs.CAPTION_TOKENS, *(name for name in values if name.startswith("tokens"))]
        else:
            names = [graphs.X, graphs.SIGMA, graphs.STEP_INDEX, graphs.NOISE, graphs.CAPTION_TOKENS]
            tokens = [values[name] for name in values if name.startswith("tokens")]
            tables = [values[name] for name in graphs.TABLES]
            outputs = (self.engine.graph(*(values[name] for name in names), tokens, tables),)
            names = [graphs.NEXT_X]
        for name, output in zip(names, outputs, strict=True):
            values[name].copy_(output)
        return True

    def _tensor(self, name: str) -> Tensor:
        _, dtype, shape = self.engine.plan["tensors"][name]
        dtype = next(ours for ours, theirs in DTYPES.items() if theirs.name == dtype)
        shape = self.shapes.get(name) or self._output_shape(name, shape)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        memory = (ctypes.c_char * nbytes).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _output_shape(self, name: str, shape: list[int]) -> tuple[int, ...]:
        if name == graphs.NEXT_X:
            return self.shapes[graphs.X]
        if name == graphs.CAPTION_TOKENS:
            return tuple(shape)
        upsample = self.engine.module.decoder.config.cell_side // 16
        _, _, height, width = self.shapes[graphs.LATENT]
        return (1, upsample * height, upsample * width, shape[-1])


def plan(graph: Graph, description: Manifest) -> dict[str, Any]:
    """Return the plan of an engine, which `FakeRuntime` deserialises from JSON."""
    dtype, tokens = NETWORK_DTYPES[description.precision], description.empty_caption.tokens
    shapes = EngineShapes(description.network, tokens, description.profiles, description.max_batch)
    tensors = varying_specs(graph, description.network, dtype, tokens)
    return {
        "graph": graph,
        "caption_tokens": tokens,
        "tensors": {
            name: ["INPUT" if spec.input else "OUTPUT", DTYPES[spec.dtype].name, spec.shape]
            for name, spec in tensors.items()
        },
        "profiles": [shapes.of(graph, profile) for profile in description.profiles],
    }


def engine_bundle(folder: Path, batch: int = 3, alter: Any = None, **changes: Any) -> Bundle:
    """Write a bundle of engines for the fake TensorRT.

    `alter` modifies the plan of each engine, and `changes` are fields of the manifest.
    """
    names: dict[Graph, str] = {graph: f"{graph}.engine" for graph in GRAPHS}
    fields = {
        "runtime": {
            "kind": "tensorrt",
            "package": "tensorrt-rtx",
            "version": VERSION,
            "compute_capability": (12, 0),
            "driver": "580.95.05",
        },
        "engines": [{"graph": graph, "file": name} for graph, name in names.items()],
        "max_batch": batch,
    }
    description: Manifest = manifest(**{**fields, **changes})

    def write(graph: Graph) -> Any:
        engine = plan(graph, description)
        if alter is not None:
            alter(engine)
        return lambda path: path.write_text(json.dumps(engine))

    caption = {"caption": torch.zeros(description.empty_caption.tokens, description.network.caption_width)}
    files = {name: write(graph) for graph, name in names.items()}
    return write_bundle(folder, description, {**files, "caption.safetensors": lambda path: save_file(caption, path)})


def fake_tensorrt(decoder: FoldedDecoder, package: Package = "tensorrt-rtx") -> TensorRT:
    """Return a fake package whose engines compute what `decoder` computes."""
    return TensorRT(package, FakeModule(decoder))
