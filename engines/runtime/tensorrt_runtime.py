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
from engines.manifest import Manifest, content_hash
from engines.pid import graphs
from engines.pid.graphs import Graph, TensorSpec, tensor_specs, varying_specs
from engines.pid.positions import make_geometry
from engines.runtime.alignment import ALIGNMENT, aligned, round_up
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.devices import device_memory
from engines.runtime.kernels.choice import Choice
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.slots import LazyGather
from engines.runtime.trt import Context, Engine, KernelCache, TensorRT, import_package
from engines.size import Size

log = logging.getLogger(__name__)


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


def check_engine(engine: Engine, manifest: Manifest, graph: Graph) -> None:
    """Check that an engine has the inputs and outputs of the network, and a profile for every size and batch.

    Raises:
        BundleError: The inputs, outputs or profiles differ.
    """
    network, dtype, tokens = manifest.network, DTYPES[manifest.precision], manifest.empty_caption.tokens
    expected, found = varying_specs(graph, network, dtype, tokens), engine.tensors()
    if set(found) != set(expected):
        differing = ", ".join(sorted(set(found) ^ set(expected)))
        raise BundleError(
            f"The engine {engine.name} does not match the network in the manifest: {differing}. Rebuild the bundle."
        )
    for name, spec in expected.items():
        if found[name] != spec:
            raise BundleError(
                f"The engine {engine.name} has {name} as {_describe(found[name])}, "
                f"but the network in the manifest requires {_describe(spec)}. Rebuild the bundle."
            )
    for index, profile in enumerate(manifest.profiles):
        if index >= engine.profiles:
            raise BundleError(f"The engine {engine.name} has no profile for {profile}. Rebuild the bundle.")
        smallest = tensor_specs(graph, network, dtype, profile.smallest, tokens, 1)
        largest = tensor_specs(graph, network, dtype, profile.largest, tokens, manifest.max_batch)
        for name in (name for name, spec in expected.items() if spec.input and -1 in spec.shape):
            low, high = engine.profile(index, name)
            if not (_fits(low, smallest[name].shape) and _fits(largest[name].shape, high)):
                raise BundleError(
                    f"The engine {engine.name} supports {name} of {list(low)} to {list(high)} for {profile}, "
                    f"not of {list(smallest[name].shape)} to {list(largest[name].shape)}. Rebuild the bundle."
                )


def _fits(smaller: Sequence[int], larger: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(smaller, larger, strict=True))


def _describe(spec: TensorSpec) -> str:
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{'input' if spec.input else 'output'} {dtype} {list(spec.shape)}"


class TensorRTBackend:
    """Runs the condition and step graphs of all sizes on compiled engines, one per graph.

    There is one execution context per graph, size and batch, because each is captured in a separate CUDA graph. They
    never run concurrently, so all share the weights, the memory for activations, and one buffer per input and output.
    """

    choices: Sequence[Choice] = ()  # TensorRT has chosen the kernels

    def __init__(self, bundle: Bundle, tensorrt: TensorRT, device: torch.device, kernels: KernelCache | None) -> None:
        """Load the engines of a bundle.

        Args:
            bundle: A bundle with compiled engines.
            tensorrt: The package that they were compiled with.
            device: Device to load them onto.
            kernels: Cache of the compiled kernels; None if the package does not compile kernels on the device.

        Raises:
            BundleError: An engine cannot be loaded, or does not match the network in the manifest.
        """
        self._manifest = manifest = bundle.manifest
        self.config, self.dtype = manifest.network, DTYPES[manifest.precision]
        self.device = torch.empty(0, device=device).device  # adds the index if `device` has none
        self._kernels = kernels
        self._engines: dict[Graph, Engine] = {}
        before = _free_memory(device)
        for entry in manifest.engines:
            self._engines[entry.graph] = tensorrt.load(entry.file, bundle.read(entry.file))
            check_engine(self._engines[entry.graph], manifest, entry.graph)
        self.non_torch_bytes = max(0, before - _free_memory(device))
        self._contexts: dict[tuple[Graph, Size, int], Context] = {}
        self._specs: dict[tuple[Graph, Size, int], dict[str, TensorSpec]] = {}
        self._tables: dict[Size, dict[str, Tensor]] = {}
        self._offsets: dict[str, int] = {}
        self._memory: Tensor

    def buffer_counts(self, info: RuntimeInfo) -> Mapping[str, int]:
        """Return the bytes for inputs and outputs."""
        return engine_counts(self._manifest, info)

    def prepare(self, info: RuntimeInfo, buffers: DeviceBuffers) -> None:
        """Create all execution contexts and the position tables of every size."""
        for cached in (self._contexts, self._specs, self._tables):
            cached.clear()
        buffers.allocate()
        self._memory = aligned(buffers.tensor("engine tensors"))
        self._offsets = _tensor_offsets(self._manifest, info)[0]
        for size in info.sizes:
            self._tables[size] = make_geometry(self.config, size, self.device)._asdict()
            self._add_context("condition", size, 1, info.caption_tokens)
            for batch in range(1, info.max_batch + 1):
                self._add_context("step", size, batch, info.caption_tokens)
        activations = buffers.activations(max(context.memory_bytes for context in self._contexts.values()))
        log.info("the engines share %.0f MiB for activations", activations.nbytes / 2**20)
        for context in self._contexts.values():
            context.use_memory(activations)

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Run the condition engine for a size."""
        names = (graphs.CAPTION_TOKENS, *graphs.token_names(self.config.token_sets))
        outputs = {name: self._view("condition", size, 1, name) for name in names}
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
        """Run the step engine for a size; the result is a buffer that the next step overwrites."""
        batch = x.shape[0]
        tensors = {graphs.STEP_INDEX: step_index, graphs.NOISE: noise, **self._tables[size]}
        for name, value in ((graphs.X, x), (graphs.SIGMA, sigma), (graphs.CAPTION_TOKENS, caption)):
            tensors[name] = self._view("step", size, batch, name).copy_(value)
        for i, name in enumerate(graphs.token_names(self.config.token_sets)):
            tensors[name] = self._view("step", size, batch, name)
            tokens.copy_to(i, tensors[name])
        tensors[graphs.NEXT_X] = self._view("step", size, batch, graphs.NEXT_X)
        self._run("step", size, batch, tensors)
        return tensors[graphs.NEXT_X]

    def on_captured(self) -> None:
        """Save the kernels that were compiled while the contexts were created."""
        if self._kernels is not None:
            self._kernels.save()

    def layers(self, graph: Graph) -> str:
        """Return the layer information of a graph's engine as JSON."""
        return self._engines[graph].layers()

    def _add_context(self, graph: Graph, size: Size, batch: int, caption_tokens: int) -> None:
        specs = tensor_specs(graph, self.config, self.dtype, size, caption_tokens, batch)
        shapes = {name: spec.shape for name, spec in specs.items() if spec.input}
        profile = self._manifest.profile_for(size)
        self._specs[graph, size, batch] = specs
        self._contexts[graph, size, batch] = self._engines[graph].context(
            profile, shapes, self._stream(), self._kernels
        )

    def _view(self, graph: Graph, size: Size, batch: int, name: str) -> Tensor:
        spec = self._specs[graph, size, batch][name]
        assert spec.dtype is not None  # noqa: S101  the tensors of a graph have a dtype
        return self._memory[self._offsets[name] :][: _nbytes(spec)].view(spec.dtype).view(spec.shape)

    def _run(self, graph: Graph, size: Size, batch: int, tensors: Mapping[str, Tensor]) -> None:
        self._contexts[graph, size, batch].run(tensors, self._stream())

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


def engine_counts(manifest: Manifest, info: RuntimeInfo) -> Mapping[str, int]:
    """Return the elements of the `DeviceBuffers` that only the engines of a bundle use, by name."""
    return {"engine tensors": _tensor_offsets(manifest, info)[1] + ALIGNMENT}


def _tensor_offsets(manifest: Manifest, info: RuntimeInfo) -> tuple[dict[str, int], int]:
    """Return where the inputs and outputs of the engines are in their buffer, and its size without its alignment.

    Each name has as much as any size needs; the condition graph writes to those of the step.
    """
    sizes: dict[str, int] = {}
    for size in info.sizes:
        dtype = DTYPES[manifest.precision]
        specs = tensor_specs("step", manifest.network, dtype, size, info.caption_tokens, info.max_batch)
        for name, spec in specs.items():
            if name not in (graphs.STEP_INDEX, graphs.NOISE, *graphs.TABLES):  # these never move
                sizes[name] = max(sizes.get(name, 0), _nbytes(spec))
    offsets, end = {}, 0
    for name, nbytes in sizes.items():
        offsets[name], end = end, end + round_up(nbytes)
    return offsets, end


def _nbytes(spec: TensorSpec) -> int:
    assert spec.dtype is not None  # noqa: S101  the tensors of a graph have a dtype
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def _free_memory(device: torch.device) -> int:
    return device_memory(device)[0] if device.type == "cuda" else 0


def open_engines(bundle: Bundle, device: torch.device) -> TensorRTBackend:
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
        return TensorRTBackend(bundle, tensorrt, device, kernels)


def kernel_file(bundle: Bundle, tensorrt: TensorRT, machine: Machine) -> Path | None:
    """Return the path of the kernel cache for a bundle, package, GPU model and driver; None if nothing is writable."""
    folder = code_cache().folder("tensorrt-rtx")
    if folder is None:
        return None
    identity = content_hash(bundle.manifest.model_dump(mode="json"))[:16]
    parts = (identity, tensorrt.version, machine.device, f"driver {machine.driver or 'unknown'}")
    return folder / f"{'-'.join(re.sub(r'[^a-z0-9.]+', '-', part.lower()).strip('-') for part in parts)}.kernels"
