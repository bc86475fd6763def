"""Runs the stages of a build in order. Each result is stored, so an interrupted build can be resumed."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engines.bundle import (
    WEIGHTS,
    Bundle,
    FileWriter,
    check_output,
    load_folded,
    remove_leftovers,
    write_bundle,
)
from engines.compile.compile_engine import EngineShapes, compile_engine
from engines.compile.describe_bundle import add_engine_warnings, add_engines, add_warning, make_manifest
from engines.compile.duration import phases
from engines.compile.export import export, file_name, onnx_files
from engines.compile.inputs.unchanged import input_files, unchanged
from engines.compile.lock import lock_output
from engines.compile.planning.estimate import check_resources
from engines.compile.planning.options import BuildOptions
from engines.compile.planning.plan import BuildPlan, make_plan
from engines.compile.planning.targets import CannotCompileError, compiler_name, find_compiler
from engines.compile.programs import describe_program, pixel_chunks
from engines.compile.progress import Display
from engines.compile.quantise import QualityError
from engines.compile.report import REPORT_HTML, REPORT_JSON, write_html
from engines.compile.results import BuildReport, Checks, DeviceResult, EngineResult, GraphResult, NetworkResult
from engines.compile.verify_engine import verify_engines
from engines.compile.verify_onnx import verify_graphs
from engines.compile.weights import CAPTION_FILE, make_weights
from engines.compile.workspace import Workspace, output_path
from engines.manifest import Manifest
from engines.pid import FoldedDecoder
from engines.pid.graphs import GRAPHS, Graph
from engines.runtime.trt import TensorRT

TIMINGS = "timings.cache"  # TensorRT's kernel timings, in the parent directory of the bundle


@dataclass(frozen=True)
class FinishedBuild:
    """A bundle and the results of the build that wrote it."""

    bundle: Bundle
    report: BuildReport


def build(options: BuildOptions, progress: Display) -> FinishedBuild:
    """Build a bundle. If a stage fails, the results of earlier stages are kept for `resume`.

    Raises:
        PidError: An option is invalid, or a stage failed.
    """
    plan = make_plan(options)
    options = plan.options
    with lock_output(options.output):
        remove_leftovers(options.output)
        check_output(options.output, replace=options.overwrite)  # again: another build may have ended since
        check_resources(plan)
        return _run(plan, Workspace.create(options), progress)


def resume(folder: Path, progress: Display) -> FinishedBuild:
    """Continue an interrupted build, perhaps one that was started on another machine.

    Raises:
        PidError: `folder` is not the workspace of a build, or a stage failed.
    """
    folder = folder.resolve()
    output = output_path(folder)
    with lock_output(output):
        remove_leftovers(output)
        workspace = Workspace.open(folder)
        plan = make_plan(workspace.options, weights_done=workspace.has("network"))
        return _run(plan, workspace, progress)


def _run(plan: BuildPlan, workspace: Workspace, progress: Display) -> FinishedBuild:
    try:
        progress.expect(tuple(phases(plan)))
        finished = _Build(plan, workspace, progress).run()
    except BaseException as error:
        if workspace.started:
            error.add_note(f"To continue the build: python build_engines.py --resume {workspace.path}")
        else:
            workspace.remove()
        raise
    workspace.remove()
    return finished


@dataclass(frozen=True)
class _Build:
    """A build in progress: one method per stage, in the order of execution."""

    plan: BuildPlan
    workspace: Workspace
    progress: Display

    def run(self) -> FinishedBuild:
        plan = self.plan
        network = self._make_weights()
        report = BuildReport(target=plan.target.name, precision=plan.precision, network=network)
        manifest = make_manifest(plan, network)
        if plan.target.compiled:
            report = self._export_graphs(report, manifest)
            compiler = self._find_compiler()
            report = self._compile_engines(report, manifest, compiler)
            manifest = add_engine_warnings(add_engines(manifest, plan, compiler), report.engines)
            report = self._verify_engines(report, manifest)
            if report.device is None:
                warning = f"The engines have not been run yet: this machine has no {plan.target.gpu}."
                manifest = add_warning(manifest, warning)
        self.progress("write", str(plan.options.output))
        bundle = self._write_bundle(report, manifest)
        self.progress("done", str(bundle.path))
        return FinishedBuild(bundle, report)

    def _make_weights(self) -> NetworkResult:
        """Load, fold and verify the network, quantise it if requested, and cast it."""

        def run() -> NetworkResult:
            with unchanged(input_files(self.plan)):
                return make_weights(self.plan, self.workspace.path, self.progress)

        return self.workspace.stage("network", NetworkResult, run, (WEIGHTS, CAPTION_FILE))

    def _export_graphs(self, report: BuildReport, manifest: Manifest) -> BuildReport:
        """Verify both graphs with ONNX Runtime at small sizes, then export them if ONNX files are needed."""
        load = self._loader(manifest)
        checks = self.workspace.stage("check", Checks, partial(self._verify_graphs, report.network, load))
        exports = tuple(
            self.workspace.stage(
                f"export {graph}", GraphResult, partial(self._export, graph, report, load), onnx_files(graph)
            )
            for graph in (GRAPHS if self.plan.exports_onnx else ())
        )
        return report.model_copy(update={"checks": checks.results, "exports": exports})

    def _loader(self, manifest: Manifest) -> Callable[[], FoldedDecoder]:
        """Return a function that reads the weights once, if a stage needs them. They are freed with the function."""
        return functools.cache(lambda: load_folded(self.workspace.bundle(manifest, (WEIGHTS,))))

    def _verify_graphs(self, network: NetworkResult, load: Callable[[], FoldedDecoder]) -> Checks:
        error = None if network.quantisation is None else network.quantisation.mean_velocity_error
        return Checks(results=verify_graphs(load(), error, self.workspace.path, partial(self.progress, "check")))

    def _export(self, graph: Graph, report: BuildReport, load: Callable[[], FoldedDecoder]) -> GraphResult:
        self.progress("export", f"{graph} graph")
        start = time.monotonic()
        largest, max_batch = self.plan.largest_size, self.plan.options.max_batch
        exported = export(load(), graph, largest, report.network.empty_caption_tokens, max_batch, self.workspace.path)
        return GraphResult(
            graph=graph,
            bytes=exported.nbytes,
            operators=dict(exported.operators),
            seconds=time.monotonic() - start,
        )

    def _find_compiler(self) -> TensorRT:
        try:
            return find_compiler(self.plan.target, self.plan.options.compiler)
        except CannotCompileError as error:
            files = "ONNX files are" if self.plan.exports_onnx else "network is"
            raise CannotCompileError(
                f"{error} The verified {files} in {self.workspace.path}: copy this directory to such a machine and "
                "resume the build there."
            ) from error

    def _compile_engines(self, report: BuildReport, manifest: Manifest, compiler: TensorRT) -> BuildReport:
        name = compiler_name(compiler, self.plan.options.compiler)
        load = self._loader(manifest)
        plan, tokens = self.plan, report.network.empty_caption_tokens
        shapes = EngineShapes(plan.decoder.config, tokens, plan.profiles, plan.options.max_batch)
        engines = tuple(
            self.workspace.stage(
                f"compile {graph} {name}",
                EngineResult,
                partial(self._compile, graph, shapes, compiler, load),
                (file_name(graph, ".engine"),),
            )
            for graph in GRAPHS
        )
        return report.model_copy(update={"engines": engines, "compiler": name})

    def _compile(
        self, graph: Graph, shapes: EngineShapes, compiler: TensorRT, load: Callable[[], FoldedDecoder]
    ) -> EngineResult:
        plan, folder, timings = self.plan, self.workspace.path, self.plan.options.output.with_name(TIMINGS)
        self.progress("compile", f"{graph} engine with {compiler_name(compiler, plan.options.compiler)}")
        program = None
        if plan.options.compiler == "torch-tensorrt":
            network = load()
            network.pixel_chunks = pixel_chunks(network, plan.largest_size, plan.options.max_batch)
            program = describe_program(network, graph, shapes.caption_tokens)
        else:
            for name in onnx_files(graph):
                self.workspace.file(name)
        return compile_engine(compiler, plan.target, graph, shapes, folder, timings, program)

    def _verify_engines(self, report: BuildReport, manifest: Manifest) -> BuildReport:
        """Compare the engines with PyTorch, if this machine has the GPU that they were compiled for.

        Raises:
            QualityError: The images differ too much, and the build is not forced.
        """
        plan = self.plan
        if not plan.target.gpu_present:
            return report

        def run() -> DeviceResult:
            files = (WEIGHTS, CAPTION_FILE, *(engine.file for engine in manifest.engines))
            return verify_engines(self.workspace.bundle(manifest, files), partial(self.progress, "verify"))

        result = self.workspace.stage("verify", DeviceResult, run)
        worst, minimum = min(result.image_psnr.values()), _minimum_of_engines(plan, report.network)
        if worst < minimum and not plan.exempt_from_quality:
            raise QualityError(
                f"The images of the engines have a PSNR of {worst:.1f} dB relative to PyTorch on {result.device}, "
                f"below {minimum:.1f} dB. Use --force to write the bundle anyway."
            )
        return report.model_copy(update={"device": result})

    def _write_bundle(self, report: BuildReport, manifest: Manifest) -> Bundle:
        folder, options = self.workspace.path, self.plan.options
        names = [CAPTION_FILE, *([engine.file for engine in manifest.engines] or [WEIGHTS])]
        if options.keep_onnx:
            names += [name for graph in GRAPHS for name in onnx_files(graph)]
        files: dict[str, FileWriter] = {name: partial(_link, self.workspace.file(name)) for name in names}
        files[REPORT_JSON] = partial(_write_text, report.model_dump_json(indent=2) + "\n")
        files[REPORT_HTML] = lambda path: write_html(path, manifest, report, folder)
        return write_bundle(options.output, manifest, files, replace=options.overwrite)


def _minimum_of_engines(plan: BuildPlan, network: NetworkResult) -> float:
    """Return the minimum PSNR of engines relative to PyTorch, in dB.

    Two implementations of one quantised network differ by up to √2 (3 dB) of the error of quantisation, because values
    near a boundary are rounded to different numbers.
    """
    if network.quantisation is None:
        return plan.options.min_psnr
    return min(plan.options.min_psnr, network.quantisation.mean_psnr - 3)


def _link(source: Path, path: Path) -> None:
    """Make a hard link, or a copy if the file system does not support it, so that gigabytes are not written twice."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
