"""Calls of the TensorRT builder, recorded by a fake, and errors if it fails. Other tests call the real builder."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.compile import compile_engine as compile_engine_module
from engines.compile.compile_engine import CompileError, EngineShapes, compile_engine
from engines.compile.planning import targets
from engines.compile.planning.targets import (
    TARGETS,
    CannotCompileError,
    Target,
    compiler_name,
    find_compiler,
    required_machine,
)
from engines.compile.torch_tensorrt_network import NetworkDefinition
from engines.size import Size
from engines.size_profiles import SizeProfile
from tests.tiny import TINY

SIZE, TALL = Size(64, 96), Size(96, 64)
SHAPES = EngineShapes(TINY, 5, (SizeProfile(SIZE, SIZE), SizeProfile(TALL, TALL)), max_batch=4)


class Recorder:
    """Replacement for a TensorRT package that records the calls. `fails` is the stage that fails: parse or build."""

    def __init__(self, package: str = "tensorrt", strongly_typed: bool = True, fails: str = "") -> None:
        self.package, self.version, self.logger, self.last_error = package, "11.4.1", None, "no kernel fits."
        self.fails = fails
        self.flags: list[str] = []
        self.profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = []
        self.timings: list[bytes] = []
        self.network_flags = 0
        self.capability = None
        names = {"STRONGLY_TYPED": 1} if strongly_typed else {}
        self.module = SimpleNamespace(
            NetworkDefinitionCreationFlag=SimpleNamespace(**names),
            Builder=lambda _logger: self,
            OnnxParser=lambda _network, _logger: self,
            ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
            BuilderFlag=SimpleNamespace(REQUIRE_USER_ALLOCATION="own memory"),
            ComputeCapability=SimpleNamespace(SM120="SM120"),
        )

    def create_network(self, flags: int) -> Any:
        self.network_flags = flags
        shapes = {"x": (-1, 3, -1, -1), "caption": (1, 5, 24)}
        tensors = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
        return SimpleNamespace(num_layers=0, num_inputs=2, get_input=lambda index: tensors[index])

    num_errors = 1

    def parse_from_file(self, _path: str) -> bool:
        return self.fails != "parse"

    def get_error(self, _index: int) -> Any:
        return SimpleNamespace(desc=lambda: "operator Foo is unknown.")

    def create_builder_config(self) -> Any:
        return self

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_compute_capability(self, capability: str, _index: int) -> None:
        self.capability = capability

    def create_optimization_profile(self) -> Any:
        self.profiles.append({})
        return self

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.profiles[-1][name] = shapes

    def add_optimization_profile(self, _profile: object) -> None:
        pass

    def create_timing_cache(self, content: bytes) -> Any:
        self.timings.append(content)
        return SimpleNamespace(serialize=lambda: b"measured")

    def set_timing_cache(self, _cache: object, _ignore_mismatch: bool) -> bool:
        return self.timings[-1] != b"of another GPU"

    def build_serialized_network(self, _network: object, _config: object) -> bytes | None:
        return None if self.fails == "build" else b"engine"


def run(compiler: Recorder, folder: Path, target: str = "gb200"):
    return compile_engine(compiler, TARGETS[target], "step", SHAPES, folder, folder / "kept" / "timings")


def test_the_engine_supports_all_sizes_and_batches_up_to_the_largest(tmp_path: Path):
    compiler = Recorder()
    result = run(compiler, tmp_path)
    assert (tmp_path / "step.engine").read_bytes() == b"engine"
    assert result.bytes == 6
    assert compiler.profiles == [
        {"x": ((1, 3, 64, 96), (1, 3, 64, 96), (4, 3, 64, 96))},
        {"x": ((1, 3, 96, 64), (1, 3, 96, 64), (4, 3, 96, 64))},
    ]
    assert compiler.flags == ["own memory"]
    assert compiler.network_flags == 1 << 1


def test_a_range_of_sizes_is_optimised_for_the_first_listed_size_in_it():
    wide = SizeProfile(Size(32, 32), Size(96, 96))
    shapes = EngineShapes(TINY, 5, (*SHAPES.profiles, wide), max_batch=4)
    assert shapes.of("step", wide)["x"] == ((1, 3, 32, 32), (1, 3, 64, 96), (4, 3, 96, 96))
    assert shapes.of("condition", wide)["latent"] == ((1, 16, 1, 1), (1, 16, 2, 3), (1, 16, 3, 3))
    small = SizeProfile(Size(32, 32), Size(64, 64))
    assert shapes.of("step", small)["x"] == ((1, 3, 32, 32), (1, 3, 64, 64), (4, 3, 64, 64))


def test_the_flag_for_strong_typing_is_omitted_if_the_version_lacks_it(tmp_path: Path):
    compiler = Recorder(strongly_typed=False)
    run(compiler, tmp_path)
    assert compiler.network_flags == 0


def test_kernel_timings_are_reused_by_later_builds(tmp_path: Path):
    run(Recorder(), tmp_path)
    second = Recorder()
    run(second, tmp_path)
    assert second.timings == [b"measured"]


def test_kernel_timings_of_a_different_gpu_are_discarded(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "timings").write_bytes(b"of another GPU")
    compiler = Recorder()
    run(compiler, tmp_path)
    assert compiler.timings == [b"of another GPU", b""]
    assert (tmp_path / "kept" / "timings").read_bytes() == b"measured"


def test_tensorrt_for_rtx_compiles_for_the_target_without_timings(tmp_path: Path):
    compiler = Recorder("tensorrt-rtx")
    run(compiler, tmp_path, "rtx5090")
    assert compiler.capability == "SM120"
    assert compiler.timings == []


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ("parse", r"tensorrt 11.4.1 rejects step.onnx: operator Foo is unknown\.$"),
        ("build", r"tensorrt 11.4.1 could not compile the step graph: no kernel fits\.$"),
    ],
)
def test_the_message_contains_the_error_of_tensorrt(fails: str, expected: str, tmp_path: Path):
    with pytest.raises(CompileError, match=expected):
        run(Recorder(fails=fails), tmp_path)
    assert not list(tmp_path.glob("*.engine"))


def test_the_message_for_an_attention_without_a_fused_kernel_says_what_to_do(tmp_path: Path):
    compiler = Recorder(fails="build")
    compiler.last_error = "IBuilder: CHECK(...) failed. Attention operation was not supported by a dedicated kernel."
    expected = (
        r"could not compile the step graph: it has no fused kernel for an attention .* Use another --precision\.$"
    )
    with pytest.raises(CompileError, match=expected):
        run(compiler, tmp_path)


def test_the_message_for_a_missing_gpu_describes_the_required_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "cuda_problem", lambda: "this machine has no NVIDIA GPU")
    with pytest.raises(CannotCompileError, match="tensorrt needs a machine with an H200, but this machine has no"):
        find_compiler(TARGETS["h200"])
    assert "with or without a GPU" in required_machine(TARGETS["rtx5090"], "tensorrt-rtx")


@pytest.mark.parametrize(
    ("target", "expected"),
    [("rtx5090", r"a Linux machine \(x86-64\) with an NVIDIA GPU"), ("h200", "a machine with an H200")],
)
def test_torch_tensorrt_needs_a_gpu(target: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "cuda_problem", lambda: "this machine has no NVIDIA GPU")
    with pytest.raises(
        CannotCompileError, match=f"torch-tensorrt needs {expected}, but this machine has no NVIDIA GPU"
    ):
        find_compiler(TARGETS[target], "torch-tensorrt")


def test_torch_tensorrt_compiles_with_the_first_package_of_the_target(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "cuda_problem", lambda: None)
    monkeypatch.setattr(targets, "installed_version", lambda _package: "2.13.0")
    monkeypatch.setattr(Target, "gpu_present", True)
    monkeypatch.setattr(targets.trt, "import_package", Recorder)
    for target, package in (("rtx5090", "tensorrt-rtx"), ("gb200", "tensorrt"), ("h200", "tensorrt")):
        compiler = find_compiler(TARGETS[target], "torch-tensorrt")
        assert compiler.package == package
        assert compiler_name(compiler, "torch-tensorrt") == f"torch-{package} 2.13.0 and {package} 11.4.1"
        assert compiler_name(compiler, None) == f"{package} 11.4.1"


def test_a_graph_that_torch_tensorrt_converts_is_compiled_like_one_from_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler, program = Recorder(fails="parse"), object()
    given: list[object] = []

    def define(package: Recorder, graph: object) -> NetworkDefinition:
        given.extend((package, graph))
        return NetworkDefinition(package, package.create_network(0), weights=None)

    monkeypatch.setattr(compile_engine_module, "define_network", define)
    compile_engine(compiler, TARGETS["gb200"], "step", SHAPES, tmp_path, tmp_path / "timings", program)
    assert given == [compiler, program]
    assert compiler.flags == ["own memory"]
    assert len(compiler.profiles) == 2
    assert (tmp_path / "step.engine").read_bytes() == b"engine"


def test_a_signal_during_the_compilation_ends_it_afterwards(tmp_path: Path):
    """TensorRT swallows exceptions in its callbacks and prints their traceback."""
    swallowed: list[BaseException] = []

    class Interrupted(Recorder):
        def build_serialized_network(self, network: object, config: object) -> bytes | None:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                swallowed.append(error)
            return super().build_serialized_network(network, config)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), tmp_path)
    assert swallowed == []
    assert not (tmp_path / "step.engine").exists()
