"""Pydantic model of manifest.json, the description of a bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from engines.errors import ConfigError
from engines.pid.config import PidConfig
from engines.pid.released import SigmaFrame
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Precision = Literal["fp32", "bf16", "fp16", "fp8"]  # fp8: linear layers in e4m3, everything else in bf16
RuntimeKind = Literal["torch", "tensorrt"]
Graph = Literal["condition", "step"]
Package = Literal["tensorrt", "tensorrt-rtx"]  # compiles and runs engines

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _plain(name: str) -> str:
    """Accept only names of files in the bundle's directory itself, other than the manifest."""
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
RelativeError = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """Size and hash of one file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class LatentSpaceEntry(_Entry):
    """Latent space that the decoder expects, see `engines.pid.released.LatentSpace`."""

    name: str
    channels: Count
    pixels_per_cell: Count
    sigma_frame: SigmaFrame


class RuntimeEntry(_Entry):
    """Runtime that executes the bundle.

    For compiled engines also the package, version, compute capability and driver that they were built for.
    """

    kind: RuntimeKind = "torch"
    package: Package | None = None
    version: str | None = None
    compute_capability: tuple[int, int] | None = None
    driver: str | None = None


class EngineEntry(_Entry):
    """One compiled graph for one output size, see `engines.pid.graphs`."""

    graph: Graph
    size: Size  # output (height, width) in pixels
    file: FileName


class Origin(_Entry):
    """Source of the weights: a checkpoint file, a random seed, or the decoder that ships with the project."""

    kind: Literal["checkpoint", "random", "bundled"]
    file: str | None = None
    sha256: Sha256 | None = None
    seed: int | None = None


class EmptyCaption(_Entry):
    """Caption embedding of requests without a caption; `zeros` if no output of a text encoder was available."""

    file: FileName
    tokens: Count
    zeros: bool


class Verification(_Entry):
    """Comparison of the folded network with the original; errors are ‖difference‖ / ‖original velocity‖."""

    velocity_error: tuple[RelativeError, ...]  # in float32, per timestep of the manifest; the maximum over the sigmas
    max_velocity_error: RelativeError
    precision_error: RelativeError  # in the bundle's precision; the maximum over timesteps and sigmas
    method: str


class Quantisation(_Entry):
    """Calibration of the FP8 layers, and their error relative to the same network without FP8."""

    layers: Count
    calibration: str
    synthetic: bool
    velocity_error: RelativeError  # relative; the maximum over the timesteps
    image_psnr: Annotated[float, Field(allow_inf_nan=False)]  # dB; the mean over the calibration images


class Manifest(_Entry):
    """Content of manifest.json; validation rejects contradictions between its fields."""

    format_version: Literal[1] = 1
    decoder: str
    latent_space: LatentSpaceEntry
    upscale: Count
    network: PidConfig
    runtime: RuntimeEntry = RuntimeEntry()
    target: str
    precision: Precision
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]  # output sizes
    max_batch: Count
    times: tuple[float, ...]  # timesteps that the network is folded for: rows of its tables
    origin: Origin
    empty_caption: EmptyCaption
    warnings: tuple[str, ...] = ()
    verification: Verification
    quantisation: Quantisation | None = None  # only for the precision fp8
    created: AwareDatetime
    builder_version: str
    torch_version: str
    licence: str
    engines: tuple[EngineEntry, ...] = ()  # only for the runtime "tensorrt": both graphs for every size
    files: dict[FileName, FileEntry] = {}

    @field_validator("network", mode="before")
    @classmethod
    def _require_every_dimension(cls, value: Any) -> Any:
        # A default value would silently describe a different network.
        if isinstance(value, Mapping):
            differing = {field.name for field in fields(PidConfig)} ^ set(value)
            if differing:
                raise ValueError(f"missing or unknown dimensions: {', '.join(sorted(differing))}")
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        space, network = self.latent_space, self.network
        for field, declared, required in (
            ("latent_space.channels", space.channels, network.latent_channels),
            ("latent_space.pixels_per_cell", space.pixels_per_cell, network.pixels_per_cell),
            ("upscale", self.upscale, network.upscale),
        ):
            if declared != required:
                raise ValueError(f"{field} is {declared}, but the network requires {required}")
        for size in self.sizes:
            try:
                network.latent_size(size)
            except ConfigError as error:
                raise ValueError(str(error).rstrip(".")) from error
        if self.times != MODEL_TIMESTEPS:
            raise ValueError(
                f"the network is folded for the timesteps {self.times}, but this release uses {MODEL_TIMESTEPS}"
            )
        if self.empty_caption.tokens > network.caption_tokens:
            raise ValueError(
                f"the empty caption has {self.empty_caption.tokens} tokens, "
                f"but the network supports at most {network.caption_tokens}"
            )
        self._check_engines()
        if (self.precision == "fp8") != (self.quantisation is not None):
            rule = "requires" if self.precision == "fp8" else "does not allow"
            raise ValueError(f"the precision {self.precision} {rule} quantisation results")
        if len(self.verification.velocity_error) != len(self.times):
            raise ValueError("verification must have one velocity error per timestep")
        return self

    def _check_engines(self) -> None:
        runtime, compiled = self.runtime, self.runtime.kind == "tensorrt"
        if compiled and None in (runtime.package, runtime.version, runtime.compute_capability):
            raise ValueError(
                "compiled engines require the package, version and compute capability that they were built for"
            )
        required = {(graph, size) for graph in get_args(Graph) for size in self.sizes} if compiled else set()
        if {(engine.graph, engine.size) for engine in self.engines} != required or len(self.engines) != len(required):
            raise ValueError(
                "the manifest must list one condition and one step engine per size"
                if compiled
                else f"the manifest lists engines, but the runtime {runtime.kind} does not use any"
            )
