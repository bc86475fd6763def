"""The build from top to bottom. Each stage runs once; a build that was interrupted goes on where it was."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from engines.bundle import WEIGHTS, Bundle, FileWriter, load_folded, write_bundle
from engines.compile.compile_engine import compile_engine
from engines.compile.estimate import check_disk
from engines.compile.export import export, file_name
from engines.compile.options import BuildOptions
from engines.compile.plan import BuildPlan, make_plan
from engines.compile.report import REPORT_HTML, REPORT_JSON, write_html
from engines.compile.results import BuildReport, Checks, DeviceResult, EngineResult, GraphResult, NetworkResult
from engines.compile.targets import CannotCompileError, find_compiler
from engines.compile.verify_engine import check_on_device
from engines.compile.verify_onnx import check
from engines.compile.weights import CAPTION_FILE, Progress, QualityError, prepare
from engines.compile.workspace import Workspace
from engines.machine import driver_version
from engines.manifest import (
    EmptyCaption,
    EngineEntry,
    FileEntry,
    Graph,
    LatentSpaceEntry,
    Manifest,
    Quantisation,
    RuntimeEntry,
)
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.trt import TensorRT
from engines.size import Size

_RELEASED_LICENCE = (
    "Released PiD weights and everything derived from them, this bundle included, are for research and evaluation only."
)
_OWN_LICENCE = "Apache-2.0, as the project that made it."
TIMINGS = "timings.cache"  # in the folder of the bundle's parent: what TensorRT measured of kernels


@dataclass(frozen=True)
class Report:
    """A finished build."""

    bundle: Bundle
    details: BuildReport


def build(options: BuildOptions, progress: Progress) -> Report:
    """Build a bundle. Raises PidError with nothing written but the folder to go on from, if there is anything to."""
    plan = make_plan(options)
    check_disk(plan)
    return _run(plan, Workspace.create(options), progress)


def resume(folder: Path, progress: Progress) -> Report:
    """Go on with a build that was interrupted, or begun on another machine. Raises PidError."""
    workspace = Workspace.open(folder)
    plan = make_plan(workspace.options, weights_done=workspace.has("network"))
    return _run(plan, workspace, progress)


def _run(plan: BuildPlan, workspace: Workspace, progress: Progress) -> Report:
    try:
        report = _stages(plan, workspace, progress)
    except BaseException as error:
        if workspace.begun:
            error.add_note(f"What is done is kept: python build_engines.py --resume {workspace.path} goes on with it.")
        else:
            workspace.remove()
        raise
    workspace.remove()
    return report


def _stages(plan: BuildPlan, workspace: Workspace, progress: Progress) -> Report:
    folder = workspace.path
    network = workspace.stage("network", NetworkResult, lambda: prepare(plan, folder, progress))
    details = BuildReport(target=plan.target.name, precision=plan.precision, network=network)
    manifest = _manifest(plan, network)
    if plan.target.compiled:
        details, manifest = _compile(plan, workspace, details, manifest, progress)
    progress("write", str(plan.output))
    bundle = _write(plan, folder, manifest, details)
    progress("done", str(bundle.path))
    return Report(bundle, details)


def _compile(
    plan: BuildPlan, workspace: Workspace, details: BuildReport, manifest: Manifest, progress: Progress
) -> tuple[BuildReport, Manifest]:
    """Export, check, compile and, where the GPU is here, verify."""
    folder, tokens = workspace.path, details.network.empty_caption_tokens
    # The weights are read once, and only if a stage needs them.
    network = functools.cache(lambda: load_folded(_bundle(folder, manifest, (WEIGHTS,))))

    def run_check() -> Checks:
        quantisation = details.network.quantisation
        error = None if quantisation is None else sum(quantisation.velocity_error) / len(quantisation.velocity_error)
        return Checks(results=check(network(), error, folder, lambda detail: progress("check", detail)))

    def run_export(graph: Graph, size: Size) -> GraphResult:
        progress("export", f"{graph} graph for {size}")
        began = time.monotonic()
        made = export(network(), graph, size, tokens, plan.max_batch, folder)
        seconds = time.monotonic() - began
        return GraphResult(graph=graph, size=size, bytes=made.nbytes, operators=dict(made.operators), seconds=seconds)

    checks = workspace.stage("check", Checks, run_check).results
    exports = tuple(
        workspace.stage(f"export {graph} {size}", GraphResult, functools.partial(run_export, graph, size))
        for graph, size in _graphs(plan)
    )
    network.cache_clear()  # TensorRT needs the memory

    try:
        compiler = find_compiler(plan.target, plan.compiler)
    except CannotCompileError as error:
        raise CannotCompileError(
            f"{error} The checked ONNX files are in {folder}: copy that folder to such a machine and go on there."
        ) from error

    def run_compile(graph: Graph, size: Size) -> EngineResult:
        progress("compile", f"{graph} engine for {size} by {compiler.package} {compiler.version}")
        timings = plan.output.resolve().with_name(TIMINGS)
        return compile_engine(compiler, plan.target, graph, size, plan.max_batch, folder, timings)

    engines = tuple(
        workspace.stage(
            f"compile {graph} {size} {compiler.package} {compiler.version}",
            EngineResult,
            functools.partial(run_compile, graph, size),
        )
        for graph, size in _graphs(plan)
    )
    manifest = _with_engines(plan, manifest, compiler)
    device = _verify(plan, workspace, manifest, progress)
    if device is None:
        warning = "The engines have not run on a GPU yet: this machine has none that they are for."
        manifest = manifest.model_copy(update={"warnings": (*manifest.warnings, warning)})
    return details.model_copy(
        update={
            "checks": checks,
            "exports": exports,
            "engines": engines,
            "device": device,
            "compiler": f"{compiler.package} {compiler.version}",
        }
    ), manifest


def _verify(plan: BuildPlan, workspace: Workspace, manifest: Manifest, progress: Progress) -> DeviceResult | None:
    """None where the GPU that the engines are for is not here. Raises QualityError."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != plan.target.compute_capability:
        return None
    names = (WEIGHTS, CAPTION_FILE, *(engine.file for engine in manifest.engines))

    def run() -> DeviceResult:
        bundle = _bundle(workspace.path, manifest, names)
        return check_on_device(bundle, lambda detail: progress("verify", detail))

    result = workspace.stage("verify", DeviceResult, run)
    worst = min(result.image_psnr.values())
    if worst < plan.min_psnr and not plan.force and not plan.random:
        raise QualityError(
            f"The engines' pictures are {worst:.1f} dB from PyTorch's on {result.device}, below the floor of "
            f"{plan.min_psnr:g} dB; --force writes the bundle nevertheless."
        )
    return result


def _graphs(plan: BuildPlan) -> Iterator[tuple[Graph, Size]]:
    for size in plan.sizes:
        yield "condition", size
        yield "step", size


def _manifest(plan: BuildPlan, network: NetworkResult) -> Manifest:
    space, config = plan.description.latent_space, plan.description.config
    quantisation = network.quantisation
    floor: tuple[str, ...] = ()
    if quantisation is not None and quantisation.mean_psnr < plan.min_psnr and not plan.random:
        floor = (f"Built by force below the quality floor: {quantisation.mean_psnr:.1f} dB, not {plan.min_psnr:g}.",)
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
        times=MODEL_TIMESTEPS,
        origin=network.origin,
        empty_caption=EmptyCaption(
            file=CAPTION_FILE, tokens=network.empty_caption_tokens, zeros=network.empty_caption_zeros
        ),
        warnings=(*plan.warnings, *floor),
        verification=network.verification,
        quantisation=None
        if quantisation is None
        else Quantisation(
            layers=sum(layer.fp8 for layer in quantisation.layers),
            calibration=quantisation.calibration,
            synthetic=quantisation.synthetic,
            velocity_error=max(quantisation.velocity_error),
            image_psnr=quantisation.mean_psnr,
        ),
        created=datetime.now(UTC),
        builder_version=_version(),
        torch_version=torch.__version__,
        licence=_RELEASED_LICENCE if network.origin.kind == "checkpoint" and not plan.demo else _OWN_LICENCE,
    )


def _with_engines(plan: BuildPlan, manifest: Manifest, compiler: TensorRT) -> Manifest:
    here = torch.cuda.is_available()
    runtime = RuntimeEntry(
        kind="tensorrt",
        package=compiler.package,
        version=compiler.version,
        compute_capability=plan.target.compute_capability,
        driver=driver_version() if here else None,
    )
    engines = tuple(
        EngineEntry(graph=graph, size=size, file=file_name(graph, size, ".engine")) for graph, size in _graphs(plan)
    )
    return Manifest.model_validate({**dict(manifest), "runtime": runtime, "engines": engines})


def _bundle(folder: Path, manifest: Manifest, names: tuple[str, ...]) -> Bundle:
    """The workspace seen as a bundle, whose files were written by this build and are not hashed yet."""
    entries = {name: FileEntry(bytes=(folder / name).stat().st_size, sha256="0" * 64) for name in names}
    return Bundle(folder, manifest.model_copy(update={"files": entries}))


def _write(plan: BuildPlan, folder: Path, manifest: Manifest, details: BuildReport) -> Bundle:
    names = [CAPTION_FILE, *([engine.file for engine in manifest.engines] or [WEIGHTS])]
    if plan.keep_onnx:
        for graph, size in _graphs(plan):
            names += [file_name(graph, size, ".onnx"), file_name(graph, size, ".onnx.data")]

    def link(name: str) -> FileWriter:
        return lambda path: _link(folder / name, path)

    files: dict[str, FileWriter] = {name: link(name) for name in names}
    files[REPORT_JSON] = lambda path: _write_text(path, details.model_dump_json(indent=2) + "\n")
    files[REPORT_HTML] = lambda path: write_html(path, manifest, details, folder)
    return write_bundle(plan.output, manifest, files, replace=plan.overwrite)


def _link(source: Path, path: Path) -> None:
    """The file itself where the file system can, so that gigabytes are not written twice."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _version() -> str:
    try:
        return importlib.metadata.version("pid-decode-server")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
