"""Makes the manifest of a bundle from the plan and the results of the build."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import torch

import engines
from engines.compile.export import file_name
from engines.compile.planning.plan import BuildPlan
from engines.compile.results import EngineResult, NetworkResult, QuantisationResult
from engines.compile.weights import CAPTION_FILE
from engines.machine import driver_version
from engines.manifest import EmptyCaption, EngineEntry, LatentSpaceEntry, Manifest, Quantisation, RuntimeEntry
from engines.pid.graphs import GRAPHS
from engines.pid.released import LatentSpace
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.trt import TensorRT

_RELEASED_LICENCE = (
    "Released PiD weights and everything derived from them, this bundle included, are for research and evaluation only."
)
OWN_LICENCE = "Apache-2.0, the licence of this project."


def make_manifest(plan: BuildPlan, network: NetworkResult) -> Manifest:
    """Make the manifest of a bundle with weights; its table of files is empty."""
    config = plan.decoder.config
    released_weights = network.origin.kind == "checkpoint" and not plan.bundled_decoder
    return Manifest(
        decoder=plan.decoder.name,
        latent_space=latent_space_entry(plan.decoder.latent_space),
        upscale=config.upscale,
        network=config,
        target=plan.target.name,
        precision=plan.precision,
        sizes=plan.sizes,
        max_batch=plan.options.max_batch,
        times=MODEL_TIMESTEPS,
        origin=network.origin,
        empty_caption=EmptyCaption(
            file=CAPTION_FILE, tokens=network.empty_caption_tokens, zeros=network.empty_caption_zeros
        ),
        warnings=(*plan.warnings, *_quality_warnings(plan, network.quantisation)),
        verification=network.verification,
        quantisation=None if network.quantisation is None else _summarise(network.quantisation),
        created=datetime.now(UTC),
        builder_version=engines.__version__,
        torch_version=torch.__version__,
        licence=_RELEASED_LICENCE if released_weights else OWN_LICENCE,
    )


def latent_space_entry(space: LatentSpace) -> LatentSpaceEntry:
    """Describe a latent space for a manifest."""
    return LatentSpaceEntry(
        name=space.name,
        channels=space.channels,
        pixels_per_cell=space.pixels_per_cell,
        sigma_frame=space.sigma_frame,
    )


def add_engines(manifest: Manifest, plan: BuildPlan, compiler: TensorRT) -> Manifest:
    """Return a copy of a manifest that describes compiled engines instead of weights."""
    runtime = RuntimeEntry(
        kind="tensorrt",
        package=compiler.package,
        version=compiler.version,
        compute_capability=plan.target.compute_capability,
        driver=driver_version() if plan.target.gpu_present else None,
    )
    entries = tuple(EngineEntry(graph=graph, file=file_name(graph, ".engine")) for graph in GRAPHS)
    return Manifest.model_validate(
        {**dict(manifest), "runtime": runtime, "engines": entries, "size_range": plan.options.size_range}
    )


def add_warning(manifest: Manifest, warning: str) -> Manifest:
    """Return a copy of a manifest with one more warning."""
    return manifest.model_copy(update={"warnings": (*manifest.warnings, warning)})


def add_engine_warnings(manifest: Manifest, engines: Sequence[EngineResult]) -> Manifest:
    """Return a copy of a manifest with warnings about kernels that were not recognised in the engines."""
    attentions = [found for engine in engines for found in engine.attentions if found.fp8 and not found.kernels]
    if attentions:
        manifest = add_warning(
            manifest,
            f"The kernels of {len(attentions)} FP8 attentions were not recognised in the engine, so they may be "
            "computed in 16 bit, which would be slower than with --attention 16bit.",
        )
    products = [found for engine in engines for found in engine.fp4_products if not found.recognised]
    if products:
        manifest = add_warning(
            manifest,
            f"{len(products)} FP4 products were not recognised in the engine, so their weights may be dequantised, "
            "which would be slower than with --precision fp8.",
        )
    return manifest


def _quality_warnings(plan: BuildPlan, quantisation: QuantisationResult | None) -> tuple[str, ...]:
    minimum = plan.options.min_psnr
    if quantisation is None or plan.random_weights or quantisation.mean_psnr >= minimum:
        return ()
    return (f"Built with --force: images have a PSNR of {quantisation.mean_psnr:.1f} dB, below {minimum:g} dB.",)


def _summarise(result: QuantisationResult) -> Quantisation:
    return Quantisation(
        layers=sum(layer.precision != "16bit" for layer in result.layers),
        fp4_layers=result.mixture.fp4_layers,
        fp4_share=result.mixture.fp4_share,
        attention=result.attention,
        calibration=result.calibration,
        synthetic=result.synthetic,
        velocity_error=max(result.velocity_error),
        image_psnr=result.mean_psnr,
    )
