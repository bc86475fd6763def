"""The bundles of the settings: opened on every device when the server starts, and again when they are replaced."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from engines.bundle import Bundle, open_bundle
from engines.errors import ConfigError, DeviceMemoryError
from engines.manifest import content_hash
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.cuda_graphs import free_bytes
from engines.runtime.devices import cuda_problem, find_device, gpu_present
from engines.runtime.memory_plan import MemoryPlan, PlannedDecoder, plan_memory
from engines.runtime.open import open_runtime, runtime_info
from engines.runtime.protocol import Runtime
from engines.runtime.weight_memory import WeightPool
from server.flag_values import is_decoder_name
from server.settings import Settings

log = logging.getLogger(__name__)

FreeMemory = Callable[[str], int | None]


class SharedBuffers:
    """Buffers that decoders share, one per device, as long as a runtime uses them.

    Attributes:
        plans: Memory of all these decoders, by device.
    """

    def __init__(self, plans: Mapping[str, MemoryPlan]) -> None:
        self.plans = plans
        self._by_device: WeakValueDictionary[str, DeviceBuffers] = WeakValueDictionary()

    def of(self, device: str) -> DeviceBuffers:
        """Return the buffers of a device, which must not be in use by a runtime that is warm."""
        buffers = DeviceBuffers(torch.device(device), str(self.plans[device]))
        return self._by_device.setdefault(device, buffers)


@dataclass(frozen=True)
class NamedBundle:
    """A bundle that was checked; implements `server.swaps.Candidate`."""

    name: str
    bundle: Bundle
    settings: Settings
    devices: Sequence[str]
    free_memory: FreeMemory
    slots: int | None  # images on a device at once
    pools: Mapping[str, WeightPool]  # by device, for weights that can move to host memory; empty if none do
    shared: SharedBuffers | None = None  # with other decoders; None: it has separate buffers

    @property
    def max_batch(self) -> int:
        """Maximum number of images per step."""
        limit = self.bundle.manifest.max_batch
        return limit if self.settings.max_batch is None else min(limit, self.settings.max_batch)

    @property
    def identity(self) -> str:
        """Hash of the fields of the manifest, which include the hashes of all files."""
        return content_hash(self.bundle.manifest.model_dump(mode="json"))

    def __str__(self) -> str:
        return str(self.bundle.path)

    def planned(self, device: str) -> PlannedDecoder:
        """Return what it needs on a device. Raises ConfigError: the bundle does not support a size."""
        settings = self.settings
        info = runtime_info(self.bundle, torch.device(device), self.slots, self._batch, settings.sizes)
        return PlannedDecoder.of(self.bundle, info.with_tiles(settings.max_pixels))

    def memory(self) -> Mapping[str, MemoryPlan]:
        """Return what it needs by device, with what it shares with other decoders."""
        if self.shared is not None:
            return {device: self.shared.plans[device].of_decoder(self.name) for device in self.devices}
        return {device: plan_memory({self.name: self.planned(device)}, owner=self.name) for device in self.devices}

    def lack(self, freed: Mapping[str, int]) -> str | None:
        """Return why it does not fit alone into the free memory of a device and `freed` bytes; None if it may fit."""
        for device, plan in self.alone().memory().items():
            free = self.free_memory(device)
            problem = plan.problem(device, None if free is None else free + freed.get(device, 0))
            if problem is not None:
                return problem
        return None

    def alone(self) -> NamedBundle:
        """Return the bundle with separate buffers, to open it while others decode."""
        return replace(self, shared=None)

    def open(self) -> dict[str, Runtime]:
        """Open the bundle on each device; return the runtimes by device.

        Raises:
            BundleError, ConfigError, DeviceMemoryError: the bundle cannot be used.
        """
        settings, shared = self.settings, self.shared
        if shared is None:
            shared = SharedBuffers(self.memory())
            for device, plan in shared.plans.items():
                log.info("%s: memory planned on %s: %s", self.name, device, plan)
            if (problem := self.lack({})) is not None:
                raise DeviceMemoryError(problem)
        if settings.cpu_threads is not None:
            torch.set_num_threads(settings.cpu_threads)
        runtimes: dict[str, Runtime] = {}
        try:
            for device in self.devices:
                runtimes[device] = open_runtime(
                    self.bundle,
                    device,
                    self.slots,
                    self._batch,
                    settings.compile,
                    settings.sizes,
                    settings.kernels,
                    settings.max_pixels,
                    shared.of(device),
                    self.pools.get(device),
                )
        except BaseException:
            for runtime in runtimes.values():
                runtime.close()
            raise
        return runtimes

    @property
    def _batch(self) -> int:
        return min(self.max_batch, self.slots or self.max_batch)


class Bundles:
    """The bundles of the settings; implements `server.swaps.DecoderSource`.

    Those of the start share buffers on each device, because its thread warms them up one after the other. A later one
    is warmed up while others decode, so it has separate buffers.

    A path that is a symbolic link can be pointed to another bundle. What is opened is the directory that it points to,
    so that a later change of the link never mixes two bundles.
    """

    def __init__(self, settings: Settings, free_memory: FreeMemory = free_bytes) -> None:
        """Create the source of the bundles of `settings`; it reads none yet.

        Args:
            settings: The server's settings.
            free_memory: Returns the free memory of a device in bytes, or None if it is not limited.
        """
        self._settings, self._free_memory = settings, free_memory
        self._slots = settings.device_slots  # of a device, for all decoders
        self._pools: dict[str, WeightPool] = {}  # by device
        self._paths: dict[str, Path] = {}  # by the name of the decoder
        self._seen: dict[str, str] = {}  # directory that was checked last, whether its bundle could be used or not

    def find_all(self) -> dict[str, NamedBundle]:
        """Check all bundles, and whether they fit into the memory; return them by the names of their decoders.

        A bundle without a name has that of its model.

        Raises:
            BundleError, ConfigError: one is not valid, its model cannot be its name, or a device has too little memory.
        """
        bundles: dict[str, Bundle] = {}
        for given, path in self._settings.bundle.items():
            directory = os.path.realpath(path)
            bundle = open_bundle(directory)
            name = given or bundle.manifest.decoder
            if not is_decoder_name(name):
                raise ConfigError(f"{name!r} cannot be the name of a decoder; choose one with --bundle NAME={path}.")
            self._paths[name], self._seen[name], bundles[name] = path, directory, bundle
        resident = self._settings.resident_of(len(bundles))
        found = {name: self._named(name, bundle) for name, bundle in bundles.items()}
        self._slots = self._slots or 1 + max(bundle.max_batch for bundle in found.values())
        found = {name: replace(bundle, slots=self._slots) for name, bundle in found.items()}
        shared = SharedBuffers(self._plan(found, resident))
        if resident is not None:
            self._pools.update({device: WeightPool(torch.device(device), resident) for device in shared.plans})
        return {name: replace(bundle, shared=shared) for name, bundle in found.items()}

    def _plan(self, found: Mapping[str, NamedBundle], resident: int | None) -> dict[str, MemoryPlan]:
        """Return what all decoders need by device, and check that it is free."""
        plans = {}
        for device in dict.fromkeys(device for bundle in found.values() for device in bundle.devices):
            planned = {name: bundle.planned(device) for name, bundle in found.items() if device in bundle.devices}
            plans[device] = plan = plan_memory(planned, resident=resident)
            log.info("memory planned on %s: %s, without the working memory of the steps", device, plan)
            if problem := plan.problem(device, self._free_memory(device)):
                raise ConfigError(problem)
        return plans

    def _named(self, name: str, bundle: Bundle) -> NamedBundle:
        devices = device_names(self._settings.devices, bundle)
        return NamedBundle(name, bundle, self._settings, devices, self._free_memory, self._slots, self._pools)

    def find(self, name: str) -> NamedBundle:
        """Check the bundle to which the path of a decoder points now.

        Raises:
            BundleError: it is not valid.
        """
        self._seen[name] = directory = os.path.realpath(self._paths[name])
        return self._named(name, open_bundle(directory))

    def is_moved(self, name: str) -> bool:
        """Return whether the path of a decoder points to another directory than when it was checked last."""
        return os.path.realpath(self._paths[name]) != self._seen[name]


def device_names(devices: str, bundle: Bundle) -> list[str]:
    """Return the PyTorch names of the devices that --devices selects, after using each once.

    Only a bundle for the target cpu is decoded on the CPU without being asked to.

    Raises:
        ConfigError: A device is unknown or unavailable, or the bundle needs a GPU; the message has the remedy.
    """
    if devices == "auto":
        return [_default_device(bundle)]
    try:
        names = [str(find_device(name.strip())) for name in devices.split(",")]
    except ConfigError as error:
        raise ConfigError(f"--devices {devices}: {error}") from error
    if len(set(names)) < len(names):
        raise ConfigError(f"--devices {devices} contains a device twice.")
    return names


def _default_device(bundle: Bundle) -> str:
    problem = cuda_problem()
    if problem is None:
        return "cuda:0"
    target = bundle.manifest.target
    if target != "cpu":
        compiled = bundle.manifest.runtime.kind == "tensorrt"
        remedy = "" if compiled else " Pass --devices cpu to decode on the CPU, which is slow."
        raise ConfigError(f"{bundle.path} was built for the target {target}, but {problem}.{remedy}")
    if gpu_present():
        log.warning("decoding on the CPU: %s", problem)
    return "cpu"
