"""Thin wrapper around TensorRT and TensorRT for RTX.

The interfaces of TensorRT 10.16 and 11 and TensorRT for RTX 1.7 are the same, with two exceptions that are handled
here: how the allocation strategy is set, and the kernels that TensorRT for RTX compiles on the GPU, with their cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import BundleError, ConfigError, DecodeError, DeviceMemoryError
from engines.manifest import Package
from engines.pid.graphs import TensorSpec

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
_DIGEST_BYTES = 32
# INFO logs every allocation, and VERBOSE every tactic that is tried.
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.DEBUG}


class KernelCache:
    """File with the kernels that TensorRT for RTX compiles on the GPU, so that later starts need not compile them.

    It begins with the SHA-256 of the rest: a power loss may truncate the file, and TensorRT would trust it. TensorRT
    ignores kernels for a different GPU, driver or TensorRT version. Processes may share the file, because it is
    replaced as a whole; the kernels of the last one that wrote it are kept.
    """

    def __init__(self, path: Path | None) -> None:
        """Create a cache in the file `path`; None keeps the kernels in memory only."""
        self.path = path
        self._raw: Any = None
        self._stored = b""

    def attach(self, runtime_config: Any) -> None:
        """Make execution contexts with this configuration use the cache. All engines share it."""
        if self._raw is None:
            self._raw = runtime_config.create_runtime_cache()
            if self.path is not None:
                self._read(self.path)
        runtime_config.set_runtime_cache(self._raw)

    def save(self) -> None:
        """Write the file if there are new kernels. Failure is only logged: the next start then compiles them again."""
        if self._raw is None or self.path is None:
            return
        content = bytes(memoryview(self._raw.serialize()))
        if content == self._stored:
            return
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
            partial.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            log.warning("cannot write the kernel cache %s; the next start recompiles: %s", self.path, error)
            return
        self._stored = content
        log.info("saved the compiled kernels to %s, %.1f MB", self.path, len(content) / 1e6)

    def _read(self, path: Path) -> None:
        try:
            stored = path.read_bytes()
            os.utime(path)  # files that have not been used for long are deleted
        except FileNotFoundError:
            log.info("no kernel cache %s yet; compiling all kernels, which takes a while", path)
            return
        except OSError as error:
            log.warning("cannot read the kernel cache, recompiling all kernels: %s", error)
            return
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            log.warning("%s is damaged; recompiling all kernels", path)
        elif self._raw.deserialize(content):
            self._stored = content
        else:
            log.warning("%s is for a different GPU, driver or TensorRT version; recompiling all kernels", path)


class Context:
    """Execution context of an engine with a profile and fixed shapes, in memory that the caller owns.

    Attributes:
        memory_bytes: Activation memory that one execution needs.
    """

    def __init__(self, raw: Any, name: str, profile: int, shapes: Mapping[str, tuple[int, ...]], stream: int) -> None:
        """Select the profile and set the shapes of a context.

        Args:
            raw: The context of TensorRT.
            name: Name of the engine, for error messages.
            profile: Index of the optimisation profile.
            shapes: Shape of each input.
            stream: CUDA stream on which `run` is called later.

        Raises:
            BundleError: The engine does not support the profile or the shapes.
        """
        self._raw, self._name = raw, name
        self._addresses: dict[str, int] = {}
        self._memory: Tensor | None = None
        if not raw.set_optimization_profile_async(profile, stream):
            raise BundleError(f"The engine {name} has no optimisation profile {profile}; rebuild the bundle.")
        for tensor, shape in shapes.items():
            if not raw.set_input_shape(tensor, shape):
                raise BundleError(f"The engine {name} does not support {tensor} {list(shape)}; rebuild the bundle.")
        missing = list(raw.infer_shapes())
        if missing:
            raise BundleError(f"The engine {name} has unexpected inputs {', '.join(missing)}; rebuild the bundle.")
        self.memory_bytes = int(raw.update_device_memory_size_for_shapes())

    def use_memory(self, memory: Tensor) -> None:
        """Set the activation memory: on the device, aligned to 256 bytes, of at least `memory_bytes` bytes."""
        self._memory = memory  # keeps it alive
        self._raw.set_device_memory(memory.data_ptr(), memory.nbytes)

    def run(self, tensors: Mapping[str, Tensor], stream: int) -> None:
        """Enqueue one execution on a CUDA stream, reading inputs from and writing outputs to `tensors`.

        Raises:
            DecodeError: TensorRT failed, or the tensors are not at the addresses of the first run. Captured graphs keep
                raw addresses.
        """
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        if not self._addresses:
            for name, tensor in tensors.items():
                if not tensor.is_contiguous() or not self._raw.set_tensor_address(name, tensor.data_ptr()):
                    raise DecodeError(f"The engine {self._name} cannot use the buffer of {name}.")
        elif addresses != self._addresses:
            moved = sorted(name for name in addresses if addresses[name] != self._addresses.get(name))
            raise DecodeError(
                f"The buffers of {', '.join(moved)} moved since the engine {self._name} first ran; warm up again."
            )
        first, self._addresses = not self._addresses, addresses
        if not self._raw.execute_async_v3(stream):
            raise DecodeError(f"TensorRT could not run the engine {self._name}; see the log for the reason.")
        if first and stream and not getattr(self._raw, "is_stream_capturable", lambda _stream: True)(stream):
            log.warning("TensorRT reports that %s cannot be captured in a CUDA graph", self._name)


class Engine:
    """Deserialised engine, whose weights are on the current device."""

    def __init__(self, owner: TensorRT, raw: Any, name: str) -> None:
        self._owner, self._raw, self.name = owner, raw, name

    @property
    def profiles(self) -> int:
        """Number of optimisation profiles."""
        return int(self._raw.num_optimization_profiles)

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the inputs and outputs by name."""
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

    def profile(self, index: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the smallest and the largest shape of an input under a profile."""
        smallest, _, largest = self._raw.get_tensor_profile_shape(name, index)
        return tuple(smallest), tuple(largest)

    def context(
        self, profile: int, shapes: Mapping[str, tuple[int, ...]], stream: int, kernels: KernelCache | None
    ) -> Context:
        """Create an execution context, which needs `Context.use_memory` before it runs.

        Args:
            profile: Index of the optimisation profile.
            shapes: Shape of each input.
            stream: CUDA stream on which it will run.
            kernels: Cache of the compiled kernels, for TensorRT for RTX.

        Raises:
            BundleError: The engine does not support the profile or the shapes.
            DeviceMemoryError: The device has too little memory for the context.
        """
        module = self._owner.module
        user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if kernels is None:
            raw = self._raw.create_execution_context(user_managed)
        else:
            config = self._raw.create_runtime_config()
            config.set_execution_context_allocation_strategy(user_managed)
            # Compile the kernels for these shapes now: a captured graph would keep using the generic fallback kernels.
            config.dynamic_shapes_kernel_specialization_strategy = (
                module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            kernels.attach(config)
            raw = self._raw.create_execution_context(config)
        if raw is None:
            raise DeviceMemoryError(
                f"TensorRT could not create a context for the engine {self.name}: {self._owner.last_error}"
            )
        return Context(raw, self.name, profile, shapes, stream)

    def layers(self) -> str:
        """Return information about the layers of the engine as JSON, in the detail chosen at build time."""
        module = self._owner.module
        return str(self._raw.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON))


class TensorRT:
    """One of the two packages, with its log forwarded to `logging`."""

    def __init__(self, package: Package, module: Any) -> None:
        self.package, self.module, self.version = package, module, str(module.__version__)
        self._errors: list[str] = []
        self.logger = _make_logger(module, self._errors)
        self._runtime: Any = None

    @property
    def compiles_on_device(self) -> bool:
        """Whether kernels are compiled when contexts are created, and therefore worth caching."""
        return self.package == "tensorrt-rtx"

    @property
    def last_error(self) -> str:
        """Message of the last error that TensorRT logged."""
        return self._errors[-1] if self._errors else "no reason was logged."

    def load(self, name: str, content: bytearray) -> Engine:
        """Deserialise an engine onto the current device.

        Args:
            name: Name of the engine, for error messages.
            content: The serialised engine; no longer needed after the call.

        Raises:
            BundleError: TensorRT cannot load the engine.
        """
        if self._runtime is None:
            self._runtime = self.module.Runtime(self.logger)
        raw = self._runtime.deserialize_cuda_engine(content)
        if raw is None:
            raise BundleError(f"{self.package} {self.version} cannot load the engine {name}: {self.last_error}")
        return Engine(self, raw, name)


@cache
def import_package(package: Package) -> TensorRT:
    """Import one of the two packages.

    Raises:
        ConfigError: The package is not installed, or cannot be imported.
    """
    module = package.replace("-", "_")
    try:
        return TensorRT(package, importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise ConfigError(f"{package} is installed but cannot be imported: {error}.") from error
        raise ConfigError(f"{package} is not installed; run `pip install {package}`.") from error
    except (ImportError, OSError) as error:
        raise ConfigError(f"{package} is installed but cannot be imported: {error}.") from error


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
