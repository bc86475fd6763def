"""What a bundle says of itself: the model behind manifest.json."""

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
Package = Literal["tensorrt", "tensorrt-rtx"]  # what compiles engines and runs them

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _plain(name: str) -> str:
    """A file name that cannot lead out of the bundle's folder."""
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class LatentSpaceEntry(_Entry):
    """The latents to send; see `engines.pid.released.LatentSpace`."""

    name: str
    channels: Count
    pixels_per_cell: Count
    sigma_frame: SigmaFrame


class RuntimeEntry(_Entry):
    """What executes the bundle; the facts of a build that ties it to a package, a GPU or a driver, where there are."""

    kind: RuntimeKind = "torch"
    package: Package | None = None
    version: str | None = None
    compute_capability: tuple[int, int] | None = None
    driver: str | None = None


class EngineEntry(_Entry):
    """One compiled graph at one output size, see `engines.pid.graphs`."""

    graph: Graph
    size: Size  # output (height, width) in pixels
    file: FileName


class Origin(_Entry):
    """Where the weights come from: a file of the operator's, a seed, or the file that ships with the project."""

    kind: Literal["checkpoint", "random", "bundled"]
    file: str | None = None
    sha256: Sha256 | None = None
    seed: int | None = None


class EmptyCaption(_Entry):
    """Caption tokens of a request that brings none; `zeros` where no encoder's output was at hand."""

    file: FileName
    tokens: Count
    zeros: bool


class Verification(_Entry):
    """The folded network against the live one; errors are relative, ‖difference‖ / ‖live velocity‖."""

    velocity_error: tuple[Error, ...]  # in float32, the largest at each of the manifest's times
    max_velocity_error: Error
    precision_error: Error  # the largest with the weights in the bundle's precision
    method: str


class Quantisation(_Entry):
    """How the FP8 layers were calibrated, and what they cost against the same network without them."""

    layers: Count
    calibration: str
    synthetic: bool
    velocity_error: Error  # relative, the largest over the times
    image_psnr: Annotated[float, Field(allow_inf_nan=False)]  # dB, the mean over the calibration's pictures


class Manifest(_Entry):
    """The whole of manifest.json. Cannot exist with contradictions between its own fields."""

    format_version: Literal[1] = 1
    decoder: str
    latent_space: LatentSpaceEntry
    upscale: Count
    network: PidConfig
    runtime: RuntimeEntry = RuntimeEntry()
    target: str
    precision: Precision
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]  # of the output
    max_batch: Count
    times: tuple[float, ...]  # rows of the folded tables
    origin: Origin
    empty_caption: EmptyCaption
    warnings: tuple[str, ...] = ()
    verification: Verification
    quantisation: Quantisation | None = None  # for the precision fp8
    created: AwareDatetime
    builder_version: str
    torch_version: str
    licence: str
    engines: tuple[EngineEntry, ...] = ()  # for the runtime "tensorrt": both graphs at every size
    files: dict[FileName, FileEntry] = {}

    def engine(self, graph: Graph, size: Size) -> str:
        """Name of the file with that graph at that size."""
        return next(engine.file for engine in self.engines if (engine.graph, engine.size) == (graph, size))

    @field_validator("network", mode="before")
    @classmethod
    def _every_dimension_is_named(cls, value: Any) -> Any:
        # A default that fills a gap would silently be another network.
        if isinstance(value, Mapping):
            differing = {field.name for field in fields(PidConfig)} ^ set(value)
            if differing:
                raise ValueError(f"missing or unknown dimensions: {', '.join(sorted(differing))}")
        return value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        space, network = self.latent_space, self.network
        for what, said, needed in (
            ("latent channels", space.channels, network.latent_channels),
            ("pixels per latent cell", space.pixels_per_cell, network.pixels_per_cell),
            ("upscale", self.upscale, network.upscale),
        ):
            if said != needed:
                raise ValueError(f"{what} is {said}, but the network's is {needed}")
        for size in self.sizes:
            try:
                network.latent_size(size)
            except ConfigError as error:
                raise ValueError(str(error).rstrip(".")) from error
        if self.times != MODEL_TIMESTEPS:
            raise ValueError(f"it is folded for the times {self.times}, but this version decodes at {MODEL_TIMESTEPS}")
        if self.empty_caption.tokens > network.caption_tokens:
            raise ValueError(
                f"the empty caption has {self.empty_caption.tokens} tokens, "
                f"but the network takes {network.caption_tokens} at most"
            )
        self._check_engines()
        if (self.precision == "fp8") != (self.quantisation is not None):
            raise ValueError(f"quantisation is {self.quantisation}, but the precision {self.precision}")
        if len(self.verification.velocity_error) != len(self.times):
            raise ValueError("verification must have one velocity error for each time")
        return self

    def _check_engines(self) -> None:
        runtime, compiled = self.runtime, self.runtime.kind == "tensorrt"
        if compiled and None in (runtime.package, runtime.version, runtime.compute_capability):
            raise ValueError("compiled engines must name the package, version and compute capability they are for")
        needed = {(graph, size) for graph in get_args(Graph) for size in self.sizes} if compiled else set()
        if {(engine.graph, engine.size) for engine in self.engines} != needed or len(self.engines) != len(needed):
            raise ValueError(
                "it must have one condition and one step engine for every size"
                if compiled
                else "it has engines, but its runtime takes none"
            )
