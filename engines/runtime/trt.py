"""TensorRT and TensorRT for RTX, whichever is installed, as the few calls that are made of them.

Versions 10.16 and 11 of the one and 1.7 of the other have one interface but for what is set apart here: where the
allocation strategy is said, and the kernels that TensorRT for RTX compiles on the GPU, with their cache.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import BundleError, ConfigError, DecodeError, DeviceMemoryError
from engines.manifest import Package

log = logging.getLogger(__name__)

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
}
# Its INFO tells of every allocation and its VERBOSE of every tactic tried.
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.DEBUG}


@dataclass(frozen=True)
class TensorSpec:
    """An engine's input or output; -1 stands for a dimension that the optimisation profile leaves open."""

    input: bool
    dtype: torch.dtype | None  # None: one that PyTorch lacks
    shape: tuple[int, ...]


class KernelCache:
    """What TensorRT for RTX compiles on the GPU, kept in a file: a second start finds it ready.

    TensorRT checks the file against the GPU, its own version and the driver's, and leaves alone what does not fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw: Any = None
        self._stored = b""

    def attach(self, runtime_config: Any) -> None:
        """Have contexts made with this configuration use the cache; one for all engines."""
        if self._raw is None:
            self._raw = runtime_config.create_runtime_cache()
            self._read()
        runtime_config.set_runtime_cache(self._raw)

    def save(self) -> None:
        """Write what is new; a folder that cannot be written to costs the next start its time, nothing else."""
        if self._raw is None:
            return
        content = bytes(memoryview(self._raw.serialize()))
        if content == self._stored:
            return
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_bytes(content)
            partial.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            log.warning("kernels are not kept for the next start, %s cannot be written: %s", self.path, error)
            return
        self._stored = content
        log.info("kept the compiled kernels in %s, %.1f MB", self.path, len(content) / 1e6)

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            log.info("no kernels are kept in %s yet: they are compiled now, which takes a while", self.path)
            return
        except OSError as error:
            log.warning("kept kernels cannot be read, all are compiled anew: %s", error)
            return
        if self._raw.deserialize(content):
            self._stored = content
        else:
            log.warning("the kernels in %s are of another GPU, version or driver: all are compiled anew", self.path)


class Context:
    """One execution of an engine at fixed shapes, over memory that the caller owns."""

    def __init__(self, raw: Any, name: str, shapes: Mapping[str, tuple[int, ...]], memory: Tensor) -> None:
        """`memory` is on the device, 256-byte aligned, and large enough for the engine."""
        self._raw, self._name = raw, name
        self._addresses: dict[str, int] = {}
        self._memory = memory  # kept alive as long as it is used
        raw.set_device_memory(memory.data_ptr(), memory.nbytes)
        for tensor, shape in shapes.items():
            if not raw.set_input_shape(tensor, shape):
                raise BundleError(f"The engine {name} does not take {tensor} {list(shape)}.")
        missing = list(raw.infer_shapes())
        if missing:
            raise BundleError(f"The engine {name} leaves the shapes of {', '.join(missing)} open.")

    def run(self, tensors: Mapping[str, Tensor], stream: int) -> None:
        """Enqueue on a CUDA stream, reading inputs from and writing outputs to `tensors`.

        A captured graph keeps raw addresses, so the tensors must be where they were at the first run.
        """
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        if not self._addresses:
            for name, tensor in tensors.items():
                if not tensor.is_contiguous() or not self._raw.set_tensor_address(name, tensor.data_ptr()):
                    raise DecodeError(f"The engine {self._name} cannot use the buffer of {name}.")
        elif addresses != self._addresses:
            moved = sorted(name for name in addresses if addresses[name] != self._addresses.get(name))
            raise DecodeError(f"The buffers of {', '.join(moved)} moved under the engine {self._name}; warm up again.")
        first, self._addresses = not self._addresses, addresses
        if not self._raw.execute_async_v3(stream):
            raise DecodeError(f"TensorRT could not run the engine {self._name}; its log says why.")
        if first and stream and not getattr(self._raw, "is_stream_capturable", lambda _stream: True)(stream):
            log.warning("TensorRT says that %s cannot be captured in a CUDA graph", self._name)


class Engine:
    """A deserialised engine: its weights are on the current device."""

    def __init__(self, owner: TensorRT, raw: Any, name: str) -> None:
        self._owner, self._raw, self.name = owner, raw, name

    @property
    def memory(self) -> int:
        """Bytes of activations that one execution needs, at the largest shapes of the profile."""
        return int(self._raw.device_memory_size_v2)

    def tensors(self) -> dict[str, TensorSpec]:
        raw, inputs = self._raw, self._owner.module.TensorIOMode.INPUT
        names = [raw.get_tensor_name(index) for index in range(raw.num_io_tensors)]
        return {
            name: TensorSpec(
                raw.get_tensor_mode(name) == inputs,
                _DTYPES.get(raw.get_tensor_dtype(name).name),
                tuple(raw.get_tensor_shape(name)),
            )
            for name in names
        }

    def profile(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Least and largest shape of an input."""
        least, _, largest = self._raw.get_tensor_profile_shape(name, 0)
        return tuple(least), tuple(largest)

    def context(self, shapes: Mapping[str, tuple[int, ...]], memory: Tensor, kernels: KernelCache | None) -> Context:
        """A context at these input shapes. Raises BundleError, or DeviceMemoryError where there is no room for it."""
        module = self._owner.module
        user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if kernels is None:
            raw = self._raw.create_execution_context(user_managed)
        else:
            config = self._raw.create_runtime_config()
            config.set_execution_context_allocation_strategy(user_managed)
            # The kernels of exactly these shapes, before the first run: a captured graph would keep its stand-ins.
            config.dynamic_shapes_kernel_specialization_strategy = (
                module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            kernels.attach(config)
            raw = self._raw.create_execution_context(config)
        if raw is None:
            raise DeviceMemoryError(f"TensorRT made no context for the engine {self.name}: {self._owner.last_error}")
        return Context(raw, self.name, shapes, memory)

    def layers(self) -> str:
        """What became of the graph's layers, as JSON; detailed if the engine was built so."""
        module = self._owner.module
        return str(self._raw.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON))


class TensorRT:
    """One of the two packages, with a logger that writes to `logging`."""

    def __init__(self, package: Package, module: Any) -> None:
        self.package, self.module, self.version = package, module, str(module.__version__)
        self._errors: list[str] = []
        self.logger = _make_logger(module, self._errors)
        self._runtime: Any = None

    @property
    def compiles_on_device(self) -> bool:
        """Whether kernels are compiled when contexts are made, and worth keeping."""
        return self.package == "tensorrt-rtx"

    @property
    def last_error(self) -> str:
        return self._errors[-1] if self._errors else "it does not say why."

    def load(self, path: Path) -> Engine:
        """Deserialise an engine onto the current device. Raises BundleError."""
        if self._runtime is None:
            self._runtime = self.module.Runtime(self.logger)
        raw = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if raw is None:
            raise BundleError(f"{self.package} {self.version} cannot load {path}: {self.last_error}")
        return Engine(self, raw, path.name)


@cache
def find(package: Package) -> TensorRT:
    """The installed package. Raises ConfigError where it is missing or does not load."""
    module = package.replace("-", "_")
    try:
        return TensorRT(package, importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise ConfigError(f"{package} is installed, but does not load: {error}.") from error
        raise ConfigError(f"{package} is not installed: `pip install {package}` brings it.") from error
    except (ImportError, OSError) as error:
        raise ConfigError(f"{package} is installed, but does not load: {error}.") from error


def _make_logger(module: Any, errors: list[str]) -> Any:
    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS.get(severity.name)
            if level is None:
                return
            log.log(level, "%s", message)
            if level == logging.ERROR:
                errors[:] = [message]

    return Logger()
