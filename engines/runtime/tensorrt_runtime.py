"""TensorRT backend: checks that a bundle's engines match this machine, and runs the two graphs on them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engines.bundle import DTYPES, Bundle
from engines.code_cache import code_cache
from engines.errors import BundleError, ConfigError
from engines.machine import device_name, driver_version
from engines.manifest import Graph, Manifest, content_hash
from engines.pid import graphs
from engines.pid.config import PATCH_PIXELS
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.slots import LazyGather
from engines.runtime.trt import Context, Engine, KernelCache, TensorRT, TensorSpec, import_package
from engines.size import Size

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; required by TensorRT


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that engines are built for."""

    device: str
    compute_capability: tuple[int, int]
    driver: str | None  # None: unknown

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Return the properties of this machine and a CUDA device.

        Raises:
            ConfigError: `device` is not a CUDA device.
        """
        if device.type != "cuda":
            raise ConfigError(
                f"TensorRT engines do not run on {device}; use a CUDA device, or a bundle built for the target cpu."
            )
        return cls(device_name(device), torch.cuda.get_device_capability(device), driver_version())


def check_machine(bundle: Bundle, installed: TensorRT, machine: Machine) -> None:
    """Check that the engines of a bundle were built for this package, version, GPU and driver.

    Raises:
        BundleError: They were built for different ones; the message names both and the remedy.
    """
    built = bundle.manifest.runtime

    def mismatch(required: str, found: str, remedy: str) -> BundleError:
        return BundleError(f"The engines in {bundle.path} require {required}, but {found}. {remedy}.")

    if (built.package, built.version) != (installed.package, installed.version):
        required, found = f"{built.package} {built.version}", f"{installed.package} {installed.version} is installed"
        raise mismatch(required, found, "Install the required version, or rebuild the bundle")
    if built.compute_capability != machine.compute_capability:
        required, found = (
            f"compute capability {major}.{minor}"
            for major, minor in (built.compute_capability or (0, 0), machine.compute_capability)
        )
        raise mismatch(required, f"{machine.device} has {found}", "Build the bundle for this GPU")
    if built.driver is not None and machine.driver is None:
        log.warning("could not determine the driver version; the engines were built with %s", built.driver)
    elif built.driver and machine.driver and _numbers(machine.driver) < _numbers(built.driver):
        raise mismatch(f"driver {built.driver} or newer", f"this machine has {machine.driver}", "Update the driver")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def expected_tensors(manifest: Manifest, graph: Graph, size: Size) -> dict[str, TensorSpec]:
    """Return the inputs and outputs of a graph, as the network in the manifest defines them; a variable batch is -1."""
    network, dtype = manifest.network, DTYPES[manifest.precision]
    caption, width = manifest.empty_caption.tokens, network.hidden_size
    tokens = (size.area // PATCH_PIXELS, width)
    condition = graph == "condition"
    batch = 1 if condition else -1

    def spec(is_input: bool, dtype: torch.dtype, *shape: int) -> TensorSpec:
        return TensorSpec(is_input, dtype, (batch, *shape))

    shared = {  # outputs of the condition graph, inputs of the step graph
        graphs.CAPTION_TOKENS: spec(not condition, dtype, caption, width),
        **{name: spec(not condition, dtype, *tokens) for name in graphs.token_names(network.token_sets)},
    }
    if condition:
        latent = (network.latent_channels, *network.latent_size(size))
        return {
            graphs.LATENT: spec(True, torch.float32, *latent),
            graphs.CAPTION: spec(True, torch.float32, caption, network.caption_width),
            **shared,
        }
    return {
        graphs.X: spec(True, torch.float32, 3, *size),
        graphs.SIGMA: spec(True, torch.float32),
        graphs.STEP_INDEX: spec(True, torch.int64),
        graphs.NOISE: spec(True, torch.float32, 3, *size),
        **shared,
        graphs.NEXT_X: spec(False, torch.float32, 3, *size),
    }


def check_engine(engine: Engine, expected: Mapping[str, TensorSpec], max_batch: int) -> None:
    """Check that an engine has the expected inputs and outputs, and supports batches of 1 to `max_batch`.

    Raises:
        BundleError: The inputs, outputs or batch sizes differ.
    """
    found = engine.tensors()
    if set(found) != set(expected):
        differing = ", ".join(sorted(set(found) ^ set(expected)))
        raise BundleError(
            f"The engine {engine.name} does not match the network in the manifest: {differing}. Rebuild the bundle."
        )
    for name, spec in expected.items():
        fixed = found[name].shape[1:] == spec.shape[1:] and len(found[name].shape) == len(spec.shape)
        if not fixed or (found[name].input, found[name].dtype) != (spec.input, spec.dtype):
            raise BundleError(
                f"The engine {engine.name} has {name} as {_describe(found[name])}, "
                f"but the network in the manifest requires {_describe(spec)}. Rebuild the bundle."
            )
        if spec.input and spec.shape[0] == -1:
            smallest, largest = engine.profile(name)
            if not smallest[0] <= 1 <= max_batch <= largest[0]:
                raise BundleError(
                    f"The engine {engine.name} supports batches of {smallest[0]} to {largest[0]}, "
                    f"not of 1 to {max_batch}. Rebuild the bundle."
                )


def _describe(spec: TensorSpec) -> str:
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{'input' if spec.input else 'output'} {dtype} {list(spec.shape)}"


class TensorRTBackend:
    """Runs the condition and step graphs of all sizes on compiled engines.

    There is one execution context per graph, size and batch, because each is captured in a separate CUDA graph. They
    never run concurrently, so all share the memory for activations, and one buffer per input and output.
    """

    def __init__(
        self, bundle: Bundle, tensorrt: TensorRT, device: torch.device, max_batch: int, kernels: KernelCache | None
    ) -> None:
        """Load the engines of a bundle.

        Args:
            bundle: A bundle with compiled engines.
            tensorrt: The package that they were compiled with.
            device: Device to load them onto.
            max_batch: Largest batch.
            kernels: Cache of the compiled kernels; None if the package does not compile kernels on the device.

        Raises:
            BundleError: An engine cannot be loaded, or does not match the network in the manifest.
        """
        manifest = bundle.manifest
        self.config, self.dtype = manifest.network, DTYPES[manifest.precision]
        self.device = torch.empty(0, device=device).device  # adds the index if `device` has none
        self._kernels = kernels
        self._engines: dict[tuple[Graph, Size], Engine] = {}
        self._tensors: dict[tuple[Graph, Size], dict[str, TensorSpec]] = {}
        before = _free_memory(device)
        for entry in manifest.engines:
            key = entry.graph, entry.size
            self._tensors[key] = expected_tensors(manifest, *key)
            self._engines[key] = tensorrt.load(entry.file, bundle.read(entry.file))
            check_engine(self._engines[key], self._tensors[key], max_batch)
        self.non_torch_bytes = max(0, before - _free_memory(device))
        self._contexts: dict[tuple[Graph, Size, int], Context] = {}
        self._buffers: dict[str, Tensor] = {}

    def prepare(self, info: RuntimeInfo) -> None:
        """Create all execution contexts and the buffers that they share."""
        self._contexts.clear()
        self._buffers.clear()
        memory = allocate_aligned(max(engine.memory for engine in self._engines.values()), self.device)
        log.info("the engines share %.0f MiB for activations", memory.nbytes / 2**20)
        for size in info.sizes:
            for name, spec in self._tensors["step", size].items():
                # One buffer per name, as large as any size needs it; the condition graph writes to those of the step.
                nbytes = _nbytes(spec, info.max_batch)
                if name in (graphs.STEP_INDEX, graphs.NOISE):
                    continue  # the buffers of the caller never move
                if name not in self._buffers or self._buffers[name].nbytes < nbytes:
                    self._buffers[name] = allocate_aligned(nbytes, self.device)
            self._contexts["condition", size, 1] = self._context("condition", size, 1, memory)
            for batch in range(1, info.max_batch + 1):
                self._contexts["step", size, batch] = self._context("step", size, batch, memory)

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Run the condition engine of a size."""
        names = (graphs.CAPTION_TOKENS, *graphs.token_names(self.config.token_sets))
        outputs = {name: self._view("condition", size, name, 1) for name in names}
        self._run("condition", size, 1, {graphs.LATENT: latent, graphs.CAPTION: caption, **outputs})
        return tuple(outputs.values())

    def step(
        self,
        size: Size,
        x: Tensor,
        sigma: Tensor,
        step_index: Tensor,
        noise: Tensor,
        caption: Tensor,
        tokens: LazyGather,
    ) -> Tensor:
        """Run the step engine of a size; the result is a buffer that the next step overwrites."""
        batch = x.shape[0]
        tensors = {graphs.STEP_INDEX: step_index, graphs.NOISE: noise}
        for name, value in ((graphs.X, x), (graphs.SIGMA, sigma), (graphs.CAPTION_TOKENS, caption)):
            tensors[name] = self._view("step", size, name, batch).copy_(value)
        for i, name in enumerate(graphs.token_names(self.config.token_sets)):
            tensors[name] = self._view("step", size, name, batch)
            tokens.copy_to(i, tensors[name])
        tensors[graphs.NEXT_X] = self._view("step", size, graphs.NEXT_X, batch)
        self._run("step", size, batch, tensors)
        return tensors[graphs.NEXT_X]

    def on_captured(self) -> None:
        """Save the kernels that were compiled while the contexts were created."""
        if self._kernels is not None:
            self._kernels.save()

    def layers(self, graph: Graph) -> list[str]:
        """Return the layer information of a graph's engines as JSON, one entry per size."""
        return [engine.layers() for (kind, _), engine in self._engines.items() if kind == graph]

    def _context(self, graph: Graph, size: Size, batch: int, memory: Tensor) -> Context:
        shapes = {name: (batch, *spec.shape[1:]) for name, spec in self._tensors[graph, size].items() if spec.input}
        return self._engines[graph, size].context(shapes, memory, self._kernels)

    def _view(self, graph: Graph, size: Size, name: str, batch: int) -> Tensor:
        spec = self._tensors[graph, size][name]
        assert spec.dtype is not None  # noqa: S101  expected tensors have a dtype
        shape = (batch, *spec.shape[1:])
        return self._buffers[name][: _nbytes(spec, batch)].view(spec.dtype).view(shape)

    def _run(self, graph: Graph, size: Size, batch: int, tensors: Mapping[str, Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        self._contexts[graph, size, batch].run(tensors, stream)


def allocate_aligned(nbytes: int, device: torch.device) -> Tensor:
    """Allocate uninitialised memory on a device, aligned to 256 bytes."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


def _nbytes(spec: TensorSpec, batch: int) -> int:
    assert spec.dtype is not None  # noqa: S101  expected tensors have a dtype
    return batch * torch.Size(spec.shape[1:]).numel() * spec.dtype.itemsize


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def open_engines(bundle: Bundle, device: torch.device, max_batch: int) -> TensorRTBackend:
    """Load the engines of a bundle onto a CUDA device.

    Raises:
        BundleError: They were built for a different machine or version, or cannot be loaded.
        ConfigError: `device` is not a CUDA device, or the package is not installed.
    """
    machine = Machine.of(device)
    package = bundle.manifest.runtime.package
    assert package is not None  # noqa: S101  manifests with engines have it
    tensorrt = import_package(package)
    check_machine(bundle, tensorrt, machine)
    kernels = KernelCache(kernel_file(bundle, tensorrt, machine)) if tensorrt.compiles_on_device else None
    with torch.cuda.device(device):
        return TensorRTBackend(bundle, tensorrt, device, max_batch, kernels)


def kernel_file(bundle: Bundle, tensorrt: TensorRT, machine: Machine) -> Path | None:
    """Return the path of the kernel cache for a bundle, package, GPU model and driver; None if nothing is writable."""
    folder = code_cache().folder("tensorrt-rtx")
    if folder is None:
        return None
    identity = content_hash(bundle.manifest.model_dump(mode="json"))[:16]
    parts = (identity, tensorrt.version, machine.device, f"driver {machine.driver or 'unknown'}")
    return folder / f"{'-'.join(re.sub(r'[^a-z0-9.]+', '-', part.lower()).strip('-') for part in parts)}.kernels"
