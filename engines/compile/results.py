"""What the stages of a build found out: kept beside the build while it runs, and in the bundle as report.json."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from engines.manifest import Graph, Origin, Verification
from engines.size import Size


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerResult(_Result):
    """One linear layer: in which precision it is computed and why."""

    name: str
    fp8: bool
    reason: str
    parameters: int
    largest_input: float | None = None  # over the calibration
    velocity_error: float | None = None  # that FP8 in this layer alone causes; relative


class PictureResult(_Result):
    """A calibration latent decoded without and with FP8, by the same noise."""

    source: str
    sigma: float
    size: Size
    psnr: float  # dB between the two


class CheckResult(_Result):
    """An exported graph in ONNX Runtime against PyTorch."""

    what: str  # the dtype of the whole network, or the kind of layer that was in FP8
    velocity_error: tuple[float, ...]  # of each step, from equal inputs; relative
    image_psnr: float  # dB, of two whole decodes
    tolerance: float


class QuantisationResult(_Result):
    calibration: str
    synthetic: bool
    velocity_error: tuple[float, ...]  # of all FP8 layers together, at each of the manifest's times; relative
    pictures: tuple[PictureResult, ...]
    kinds: tuple[CheckResult, ...]  # each kind of FP8 layer by itself, exported
    layers: tuple[LayerResult, ...]

    @property
    def mean_psnr(self) -> float:
        return sum(picture.psnr for picture in self.pictures) / len(self.pictures)


class NetworkResult(_Result):
    """Weights loaded, folded, quantised where asked, cast, and verified; the sizes count weights alone."""

    origin: Origin
    live_parameters: int
    folded_parameters: int
    folded_bytes: int
    verification: Verification
    quantisation: QuantisationResult | None = None
    empty_caption_tokens: int
    empty_caption_zeros: bool


class GraphResult(_Result):
    graph: Graph
    size: Size
    bytes: int
    operators: dict[str, int]
    seconds: float


class EngineResult(_Result):
    graph: Graph
    size: Size
    bytes: int
    seconds: float


class DeviceResult(_Result):
    """Engines on the GPU they are for, against PyTorch on the same."""

    device: str
    velocity_error: dict[str, tuple[float, ...]]  # by size, of each step
    image_psnr: dict[str, float]  # by size, dB
    milliseconds: dict[str, float]  # by size, one decode
    peak_bytes: Annotated[int, Field(ge=0)] | None
    fused_attention: bool  # the engine's layer information names a fused attention kernel


class Checks(_Result):
    results: tuple[CheckResult, ...]


class BuildReport(_Result):
    """All of a build, as it lies in the bundle; what does not apply is left out."""

    target: str
    precision: str
    network: NetworkResult
    compiler: str | None = None
    checks: tuple[CheckResult, ...] = ()
    exports: tuple[GraphResult, ...] = ()
    engines: tuple[EngineResult, ...] = ()
    device: DeviceResult | None = None
