"""The bundles of the settings: opened on every device when the server starts, and again when they are replaced."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engines.bundle import Bundle, open_bundle
from engines.errors import ConfigError
from engines.manifest import content_hash
from engines.runtime.devices import cuda_problem, find_device, gpu_present
from engines.runtime.open import open_runtime
from engines.runtime.protocol import Runtime
from server.flag_values import is_decoder_name
from server.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedBundle:
    """A bundle that was checked; implements `server.swaps.Candidate`."""

    bundle: Bundle
    settings: Settings
    slots: int | None  # images on a device at once

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

    def open(self) -> dict[str, Runtime]:
        """Open the bundle on each device; return the runtimes by device.

        Raises:
            BundleError, ConfigError, DeviceMemoryError: the bundle cannot be used.
        """
        settings = self.settings
        if settings.cpu_threads is not None:
            torch.set_num_threads(settings.cpu_threads)
        return {
            device: open_runtime(
                self.bundle,
                device,
                self.slots,
                min(self.max_batch, self.slots or self.max_batch),
                settings.compile,
                settings.sizes,
                settings.kernels,
                settings.max_pixels,
            )
            for device in device_names(settings.devices, self.bundle)
        }


class Bundles:
    """The bundles of the settings; implements `server.swaps.DecoderSource`.

    A path that is a symbolic link can be pointed to another bundle. What is opened is the directory that it points to,
    so that a later change of the link never mixes two bundles.
    """

    def __init__(self, settings: Settings) -> None:
        """Create the source of the bundles of `settings`; it reads none yet."""
        self._settings = settings
        self._slots = settings.device_slots  # of a device, for all decoders
        self._paths: dict[str, Path] = {}  # by the name of the decoder
        self._seen: dict[str, str] = {}  # directory that was checked last, whether its bundle could be used or not

    def find_all(self) -> dict[str, NamedBundle]:
        """Check all bundles; return them by the names of their decoders.

        A bundle without a name has that of its model.

        Raises:
            BundleError, ConfigError: one is not valid, or its model cannot be its name.
        """
        bundles: dict[str, Bundle] = {}
        for given, path in self._settings.bundle.items():
            directory = os.path.realpath(path)
            bundle = open_bundle(directory)
            name = given or bundle.manifest.decoder
            if not is_decoder_name(name):
                raise ConfigError(f"{name!r} cannot be the name of a decoder; choose one with --bundle NAME={path}.")
            self._paths[name], self._seen[name], bundles[name] = path, directory, bundle
        found = {name: NamedBundle(bundle, self._settings, self._slots) for name, bundle in bundles.items()}
        self._slots = self._slots or 1 + max(bundle.max_batch for bundle in found.values())
        return {name: replace(bundle, slots=self._slots) for name, bundle in found.items()}

    def find(self, name: str) -> NamedBundle:
        """Check the bundle to which the path of a decoder points now.

        Raises:
            BundleError: it is not valid.
        """
        self._seen[name] = directory = os.path.realpath(self._paths[name])
        return NamedBundle(open_bundle(directory), self._settings, self._slots)

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
