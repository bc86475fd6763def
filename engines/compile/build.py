"""The build from top to bottom: load, fold, verify, cast, verify, write."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.bundle import CAPTION_KEY, DTYPES, WEIGHTS, Bundle, write_bundle
from engines.compile import verify
from engines.compile.load import load_decoder, load_empty_caption
from engines.compile.plan import BuildOptions, Plan, make_plan
from engines.manifest import EmptyCaption, LatentSpaceEntry, Manifest, Origin, Verification
from engines.pid import FoldedDecoder, fold
from engines.pid.sampler import CALL_TIMES

CAPTION_FILE = "empty_caption.safetensors"
_RELEASED_LICENCE = (
    "Released PiD weights and everything derived from them, this bundle included, are for research and evaluation only."
)
_OWN_LICENCE = "Apache-2.0, as the project that made it."

Progress = Callable[[str, str], None]  # stage and what it does or did


@dataclass(frozen=True)
class Report:
    """A finished build; the sizes count weights alone, both in the bundle's precision."""

    bundle: Bundle
    live_parameters: int
    live_bytes: int
    folded_parameters: int
    folded_bytes: int


def build(options: BuildOptions, progress: Progress) -> Report:
    """Build a bundle. Raises PidError with nothing written; memory peaks at one network in float32."""
    plan = make_plan(options)
    dtype = DTYPES[plan.precision]
    config = plan.description.config
    caption = load_empty_caption(plan.empty_caption, config, plan.description.empty_tokens)

    progress("load", f"{plan.description.name} from {plan.checkpoint or f'random weights, seed {plan.seed}'}")
    decoder, origin = load_decoder(plan)
    live_parameters = _count(decoder)

    progress("verify", f"live network, {live_parameters:,} parameters")
    probe = verify.make_probe(config)
    expected = verify.velocities(decoder, probe)

    progress("fold", f"for the times {', '.join(map(str, CALL_TIMES))}")
    folded = fold(decoder, CALL_TIMES)
    del decoder  # and with it the layers that the tables replace

    progress("verify", f"folded network, {_count(folded):,} parameters")
    folding = verify.check_folding(folded, probe, expected)

    progress("cast", f"weights to {plan.precision}")
    verify.cast(folded, dtype)

    progress("verify", f"folded network in {plan.precision}")
    cast_error = max(verify.relative_errors(verify.velocities(folded, probe), expected))

    progress("write", str(plan.output))
    manifest = _manifest(plan, origin, caption, verify.summarise(probe, plan.precision, folding, cast_error))
    bundle = _write(plan, manifest, folded, caption.to(dtype))
    progress("done", str(bundle.path))
    table_bytes = sum(table.nbytes for table in folded.buffers())
    return Report(
        bundle=bundle,
        live_parameters=live_parameters,
        live_bytes=live_parameters * dtype.itemsize,
        folded_parameters=_count(folded),
        folded_bytes=_count(folded) * dtype.itemsize + table_bytes,
    )


def _manifest(plan: Plan, origin: Origin, caption: Tensor, verification: Verification) -> Manifest:
    space, config = plan.description.latent_space, plan.description.config
    return Manifest(
        decoder=plan.description.name,
        latent_space=LatentSpaceEntry(
            name=space.name,
            channels=space.channels,
            pixels_per_cell=space.pixels_per_cell,
            sigma_frame=space.sigma_frame,
        ),
        upscale=config.upscale,
        network=config,
        target=plan.target.name,
        precision=plan.precision,
        sizes=plan.sizes,
        max_batch=plan.max_batch,
        times=CALL_TIMES,
        origin=origin,
        empty_caption=EmptyCaption(file=CAPTION_FILE, tokens=len(caption), zeros=not caption.any()),
        warnings=plan.warnings,
        verification=verification,
        created=datetime.now(UTC),
        builder_version=_version(),
        torch_version=torch.__version__,
        licence=_RELEASED_LICENCE if origin.kind == "checkpoint" and not plan.demo else _OWN_LICENCE,
    )


def _write(plan: Plan, manifest: Manifest, folded: FoldedDecoder, caption: Tensor) -> Bundle:
    state: dict[str, Any] = folded.state_dict()
    return write_bundle(
        plan.output,
        manifest,
        {
            WEIGHTS: lambda path: save_file(state, path),
            CAPTION_FILE: lambda path: save_file({CAPTION_KEY: caption.contiguous()}, path),
        },
        replace=plan.overwrite,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _version() -> str:
    try:
        return importlib.metadata.version("pid-decode-server")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
