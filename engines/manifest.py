"""Content of manifest.json, the description of a bundle: a pydantic model, and reading and writing it with its hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from engines.errors import BundleError, ConfigError
from engines.pid.config import PidConfig
from engines.pid.graphs import GRAPHS, Graph
from engines.pid.released import SigmaFrame, released_names
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import MAX_SIZES, Size
from engines.size_profiles import SizeProfile, SizeRange, check_size_range, size_profiles

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_BATCH = 256  # images per step
SEEDS = range(-(2**63), 2**64)  # accepted by PyTorch's generators

_HASH = "sha256"  # field of manifest.json with the hash of all others
_LONGEST_MESSAGE = 500  # characters; messages quote the file
_LONGEST_NAME = 50

# fp8 and fp4: linear layers in e4m3, and in e2m1 with block scales, as far as the images allow; the rest is in bf16.
Precision = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]
Quantised = Literal["fp8", "fp4"]
LayerPrecision = Literal["fp4", "fp8", "16bit"]  # of a linear layer
RuntimeKind = Literal["torch", "tensorrt"]
Package = Literal["tensorrt", "tensorrt-rtx"]  # compiles and runs engines
AttentionKind = Literal["patch", "pixel"]  # the attention of the patch blocks and that of the pixel blocks

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _plain(name: str) -> str:
    """Accept only names of files in the bundle's directory itself, other than the manifest."""
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


# Every value is bounded, so that a damaged manifest cannot make a reader allocate memory.
FileName = Annotated[str, Field(max_length=255), AfterValidator(_plain)]
Name = Annotated[str, Field(max_length=255)]
Text = Annotated[str, Field(max_length=2000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
Version = Annotated[int, Field(ge=0, le=999)]  # part of a version number
RelativeError = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PerTimestep = Field(max_length=len(MODEL_TIMESTEPS))


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """Size and hash of one file."""

    bytes: Annotated[int, Field(ge=0, lt=1 << 50)]
    sha256: Sha256


class LatentSpaceEntry(_Entry):
    """Latent space that the decoder expects, see `engines.pid.released.LatentSpace`."""

    name: Name
    channels: Count
    pixels_per_cell: Count
    sigma_frame: SigmaFrame


class RuntimeEntry(_Entry):
    """Runtime that executes the bundle.

    For compiled engines also the package, version, compute capability and driver that they were built for.
    """

    kind: RuntimeKind = "torch"
    package: Package | None = None
    version: Name | None = None
    compute_capability: tuple[Version, Version] | None = None
    driver: Name | None = None


class EngineEntry(_Entry):
    """One compiled graph, see `engines.pid.graphs`, with one optimisation profile per entry of `Manifest.profiles`."""

    graph: Graph
    file: FileName


class Origin(_Entry):
    """Source of the weights: a checkpoint file, a random seed, or the decoder that ships with the project."""

    kind: Literal["checkpoint", "random", "bundled"]
    file: Name | None = None
    sha256: Sha256 | None = None
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[-1])] | None = None


class EmptyCaption(_Entry):
    """Caption embedding of requests without a caption; `zeros` if no output of a text encoder was available."""

    file: FileName
    tokens: Count
    zeros: bool


class Verification(_Entry):
    """Comparison of the folded network with the original; errors are ‖difference‖ / ‖original velocity‖."""

    # In float32, per timestep of the manifest; the maximum over the sigmas.
    velocity_error: Annotated[tuple[RelativeError, ...], PerTimestep]
    max_velocity_error: RelativeError
    precision_error: RelativeError  # in the bundle's precision; the maximum over timesteps and sigmas
    method: Text


class Quantisation(_Entry):
    """Calibration of quantised layers and attention, and their error relative to the same network in 16 bits."""

    layers: Count  # in FP8 or FP4
    fp4_layers: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    fp4_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the weights that may be quantised
    attention: Annotated[tuple[AttentionKind, ...], Field(max_length=2)] = ()  # kinds that are computed in FP8
    calibration: Text
    synthetic: bool
    velocity_error: RelativeError  # relative; the maximum over the timesteps
    image_psnr: Annotated[float, Field(allow_inf_nan=False)]  # dB; the mean over the calibration images


class Manifest(_Entry):
    """Content of manifest.json except its hash; validation rejects contradictions between the fields."""

    format_version: Literal[3] = 3
    decoder: Name
    latent_space: LatentSpaceEntry
    upscale: Count
    network: PidConfig
    runtime: RuntimeEntry = RuntimeEntry()
    target: Name
    precision: Precision
    sizes: Annotated[tuple[Size, ...], Field(min_length=1, max_length=MAX_SIZES)]  # output sizes
    max_batch: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    # Timesteps that the network is folded for: rows of its tables.
    times: Annotated[tuple[float, ...], PerTimestep]
    origin: Origin
    empty_caption: EmptyCaption
    warnings: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    verification: Verification
    quantisation: Quantisation | None = None  # only for the precisions fp8 and fp4
    created: AwareDatetime
    builder_version: Name
    torch_version: Name
    licence: Text
    # Only for the runtime "tensorrt": one engine per graph, and other sizes that they can be used for.
    engines: Annotated[tuple[EngineEntry, ...], Field(max_length=len(GRAPHS))] = ()
    size_range: SizeRange | None = None
    files: Annotated[dict[FileName, FileEntry], Field(max_length=1000)] = {}

    @field_validator("network", mode="before")
    @classmethod
    def _require_every_dimension(cls, value: Any) -> Any:
        # A default value would silently describe a different network.
        if isinstance(value, Mapping):
            differing = {field.name for field in fields(PidConfig)} ^ set(value)
            if differing:
                raise ValueError(f"missing or unknown dimensions: {', '.join(sorted(differing)[:3])}")
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
        if (self.precision in get_args(Quantised)) != (self.quantisation is not None):
            rule = "requires" if self.precision in get_args(Quantised) else "does not allow"
            raise ValueError(f"the precision {self.precision} {rule} quantisation results")
        if self.quantisation is not None and self.quantisation.fp4_layers > self.quantisation.layers:
            raise ValueError("quantisation has more layers in FP4 than layers")
        if len(self.verification.velocity_error) != len(self.times):
            raise ValueError("verification must have one velocity error per timestep")
        return self

    def _check_engines(self) -> None:
        runtime, compiled = self.runtime, self.runtime.kind == "tensorrt"
        if compiled and None in (runtime.package, runtime.version, runtime.compute_capability):
            raise ValueError(
                "compiled engines require the package, version and compute capability that they were built for"
            )
        required = sorted(GRAPHS) if compiled else []
        if sorted(engine.graph for engine in self.engines) != required:
            raise ValueError(
                "the manifest must list one condition and one step engine"
                if compiled
                else f"the manifest lists engines, but the runtime {runtime.kind} does not use any"
            )
        if self.size_range is not None:
            if not compiled:
                raise ValueError(f"the manifest has a size range, but the runtime {runtime.kind} does not use any")
            check_size_range(self.size_range, self.network)

    @property
    def profiles(self) -> tuple[SizeProfile, ...]:
        """Optimisation profiles of the engines, in order: one per size, then that of the size range."""
        return size_profiles(self.sizes, self.size_range)

    def profile_for(self, size: Size) -> int:
        """Return the index of the optimisation profile for an output size.

        Raises:
            ConfigError: No profile covers the size.
        """
        for index, profile in enumerate(self.profiles):
            if profile.covers(size):
                return index
        raise ConfigError(f"The engines support {', '.join(map(str, self.profiles))}, not {size}.")


def manifest_text(manifest: Manifest) -> str:
    """Return the text of manifest.json, including the hash of all its fields."""
    content = manifest.model_dump(mode="json")
    return json.dumps({**content, _HASH: content_hash(content)}, indent=2, ensure_ascii=False) + "\n"


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the fields of a manifest.json except `sha256`; layout and order do not affect it."""
    hashed = {name: value for name, value in content.items() if name != _HASH}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle.

    Raises:
        BundleError: The manifest is missing, modified or invalid, or has another format version.
    """
    file = folder / MANIFEST
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        found = content_hash(content)
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_file():
            message = f"{folder} is a file, but a bundle is a directory."
        elif folder.is_dir():
            message = f"{folder} is not a bundle: it contains no {MANIFEST}."
        else:
            message = f"There is no bundle at {folder}."
        raise BundleError(message) from None
    except OSError as error:
        reason = f"{error.strerror}. Check its permissions and the disk"
        raise BundleError(f"{file} cannot be read: {reason}.") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read: {error}. Copy or build the bundle again.") from error
    version, listed = content.get("format_version"), content.pop(_HASH, None)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{file} has format version {version!s:.20}; this release reads version {FORMAT_VERSION}. Build the bundle "
            f"again: {_build_command(content)}."
        )
    if listed != found:
        raise BundleError(
            f"{file} was modified or damaged: the SHA-256 of its content is {found}, but it lists {listed!s:.64}. "
            "Copy or build the bundle again."
        )
    return _validate(content, file)


def read_json(file: Path) -> Any:
    """Read a manifest.json without checking its content.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is too large, or not JSON.
        RecursionError: It is nested too deeply.
    """
    with file.open("rb") as opened:
        content = opened.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MAX_MANIFEST_BYTES:,} bytes")
    return json.loads(content)


def _build_command(content: dict[str, Any]) -> str:
    """Return the command that builds a bundle with the decoder and target of a manifest of any format version."""
    values = {"decoder": "NAME", "target": "TARGET", "precision": "PRECISION"}
    for name in values:
        value = content.get(name)
        if isinstance(value, str) and len(value) < _LONGEST_NAME and _PLAIN_NAME.fullmatch(value):
            values[name] = value
    options = " ".join(f"--{name} {value}" for name, value in values.items())
    inputs = "--checkpoint FILE --empty-caption FILE " if values["decoder"] in ("NAME", *released_names()) else ""
    return f"python build_engines.py {options} {inputs}--output DIR"


def _validate(content: dict[str, Any], file: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = f"{f'{field}: ' if field else ''}{first['msg'].removeprefix('Value error, ')}"
    except ConfigError as error:
        message = f"network: {str(error).removesuffix('.')}"
    raise BundleError(f"{file} is invalid: {message:.{_LONGEST_MESSAGE}}.")
