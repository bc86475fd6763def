"""Results of the build stages: stored in the workspace during the build, and in the bundle as report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.manifest import AttentionKind, LayerPrecision, Origin, Verification
from engines.pid.graphs import Graph
from engines.size import Size


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerResult(_Result):
    """A linear layer: its precision, the reason for it, and the error that each precision causes."""

    name: str
    precision: LayerPrecision
    reason: str
    parameters: int
    largest_input: float | None = None  # largest |input| during calibration
    # Relative velocity error with only this layer quantised; None: not measured.
    fp8_error: float | None = None
    fp4_error: float | None = None

    @property
    def largest_text(self) -> str:
        """The calibrated range, for people."""
        return "" if self.largest_input is None else f"{self.largest_input:.3g}"


class AttentionResult(_Result):
    """An attention: its precision, the reason for it, and the error that FP8 causes."""

    name: str
    precision: Literal["fp8", "16bit"]
    reason: str
    largest: tuple[float, float, float] | None = None  # largest |q|, |k|, |v| during calibration; None: not measured
    fp8_error: float | None = None  # relative velocity error with only this attention in FP8

    @property
    def fp4_error(self) -> None:
        """Attention is never in FP4."""

    @property
    def largest_text(self) -> str:
        """The calibrated range, for people."""
        values = () if self.largest is None else zip("qkv", self.largest, strict=True)
        return ", ".join(f"{name} {value:.3g}" for name, value in values)


class AttentionCandidate(_Result):
    """Kinds of attention that were tried in FP8, together with the FP8 layers."""

    kinds: tuple[AttentionKind, ...]
    velocity_error: tuple[float, ...]  # relative, per timestep
    image_psnr: float  # dB; the mean over the calibration images, against no quantisation


class MixtureResult(_Result):
    """Precisions of the layers that were tried, together with the chosen attention."""

    fp4_layers: int
    fp8_layers: int
    fp4_share: float  # of the weights that may be quantised
    image_psnr: float  # dB; the mean over the calibration images, against no quantisation
    chosen: bool


class ImageResult(_Result):
    """A calibration latent decoded without and with quantisation, with the same noise."""

    source: str
    sigma: float
    size: Size
    psnr: float  # dB between the two images


def mean_psnr(images: Sequence[ImageResult]) -> float:
    """Return the mean PSNR in dB of images."""
    return sum(image.psnr for image in images) / len(images)


class CheckResult(_Result):
    """Comparison of ONNX Runtime with PyTorch."""

    what: str  # dtype of the whole network, or precision and pattern of the only quantised layers
    sizes: tuple[Size, ...]  # output sizes that were compared
    velocity_error: tuple[float, ...]  # relative, per size, both given the same x; the maximum over the steps
    image_psnr: float  # dB, between two separate decodes; the minimum over the sizes
    tolerance: float


class QuantisationResult(_Result):
    """Calibration of quantised layers and attention, and the error that they cause."""

    calibration: str
    synthetic: bool
    velocity_error: tuple[float, ...]  # relative, of everything quantised together, per timestep
    pictures: tuple[ImageResult, ...]
    kinds: tuple[CheckResult, ...]  # one per kind of quantised layer and attention, each exported separately
    layers: tuple[LayerResult, ...]
    attentions: tuple[AttentionResult, ...]
    candidates: tuple[AttentionCandidate, ...]  # for FP8 attention, in the order they were tried; the last was chosen
    mixtures: tuple[MixtureResult, ...]  # of precisions, in the order they were tried; one was chosen

    @property
    def mixture(self) -> MixtureResult:
        """The chosen precisions."""
        return next(mixture for mixture in self.mixtures if mixture.chosen)

    @property
    def attention(self) -> tuple[AttentionKind, ...]:
        """Kinds of attention that are computed in FP8."""
        return self.candidates[-1].kinds

    @property
    def mean_psnr(self) -> float:
        """Mean PSNR in dB of the calibration images."""
        return mean_psnr(self.pictures)

    @property
    def mean_velocity_error(self) -> float:
        """Mean relative velocity error over the timesteps."""
        return sum(self.velocity_error) / len(self.velocity_error)


class NetworkResult(_Result):
    """The weights: where they come from, their size, and the errors of folding, quantisation and precision."""

    origin: Origin
    live_parameters: int  # before folding
    folded_parameters: int
    folded_bytes: int
    verification: Verification
    quantisation: QuantisationResult | None = None
    empty_caption_tokens: int
    empty_caption_zeros: bool


class GraphResult(_Result):
    """An exported graph."""

    graph: Graph
    bytes: int
    operators: dict[str, int]  # operator type -> number of nodes
    seconds: float


class AttentionKernels(_Result):
    """An attention in a compiled engine: its precision in the network, and the kernels found in the engine."""

    name: str
    fp8: bool
    kernels: tuple[str, ...]  # instructions of its products, one entry per optimisation profile; empty: not recognised


class Fp4Product(_Result):
    """A matrix product with an FP4 weight in a compiled engine."""

    name: str
    bytes: int  # of the weight's numbers, without scales
    recognised: bool  # whether the engine says that it contains them in FP4


class EngineResult(_Result):
    """A compiled engine."""

    graph: Graph
    bytes: int
    seconds: float
    attentions: tuple[AttentionKernels, ...] = ()
    fp4_products: tuple[Fp4Product, ...] = ()


class DeviceResult(_Result):
    """Comparison of the engines with PyTorch on the GPU that they were compiled for. Keys are sizes."""

    device: str
    velocity_error: dict[str, tuple[float, ...]]  # relative, per step
    image_psnr: dict[str, float]  # dB
    milliseconds: dict[str, float]  # duration of a decode
    peak_bytes: Annotated[int, Field(ge=0)] | None
    fused_attention: bool  # whether the engines' layer information names a fused attention kernel


class Checks(_Result):
    """Results of the stage that verifies exported graphs."""

    results: tuple[CheckResult, ...]


class BuildReport(_Result):
    """Results of all stages, the content of report.json."""

    target: str
    precision: str
    network: NetworkResult
    compiler: str | None = None
    checks: tuple[CheckResult, ...] = ()
    exports: tuple[GraphResult, ...] = ()
    engines: tuple[EngineResult, ...] = ()
    device: DeviceResult | None = None
