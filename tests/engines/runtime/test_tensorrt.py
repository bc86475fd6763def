"""Compiled engines: refused unless they fit the machine and the manifest; memory and addresses that never move.

All with a fake TensorRT, so that it runs anywhere.
"""

import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engines.bundle import Bundle
from engines.compile.export import export
from engines.errors import BundleError, ConfigError, DecodeError, DeviceMemoryError
from engines.pid import PidDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime import tensorrt_runtime
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.open import open_runtime
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.tensorrt_runtime import (
    Machine,
    TensorRTBackend,
    check_machine,
    expected_tensors,
    kernel_file,
    open_engines,
)
from engines.runtime.trt import KernelCache, TensorRT, find
from tests.engines.runtime.fake_tensorrt import (
    VERSION,
    DataType,
    FakeContext,
    FakeEngine,
    FakeModule,
    FakeRuntime,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    engine_bundle,
    fake_tensorrt,
)
from tests.tiny import TINY, manifest

SIZE, WIDE = (64, 64), (64, 96)
OWN = {"compile"}  # what the fake's classes tell each other
DECODER = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
CPU = torch.device("cpu")
RTX5090 = Machine("NVIDIA GeForce RTX 5090", (12, 0), "580.95.05")
INFO = RuntimeInfo(
    "tiny", "flux", 16, 8, 4, "flow", 5, 24, (SIZE, WIDE), max_batch=3, slots=3, precision="fp32", kind="tensorrt",
    device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="engines.runtime.trt")  # the builder silences it


@pytest.fixture
def tensorrt() -> TensorRT:
    return fake_tensorrt(DECODER)


def make_stages(folder: Path, tensorrt: TensorRT, alter: Callable | None = None, **changes) -> TensorRTBackend:
    bundle = engine_bundle(folder / "tiny", alter=alter, **{"sizes": (SIZE, WIDE), **changes})
    return TensorRTBackend(bundle, tensorrt, CPU, 3, KernelCache(folder / "tiny.kernels"))


def make_runtime(folder: Path, tensorrt: TensorRT) -> DeviceRuntime:
    return DeviceRuntime(make_stages(folder, tensorrt), torch.zeros(5, 24), INFO)


def contexts(tensorrt: TensorRT) -> list[FakeContext]:
    return tensorrt.module.contexts


class TestMachine:
    def refusal(self, bundle: Bundle, tensorrt: TensorRT, machine: Machine) -> str:
        with pytest.raises(BundleError) as caught:
            check_machine(bundle, tensorrt, machine)
        assert str(bundle.path) in str(caught.value)
        return str(caught.value)

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return engine_bundle(tmp_path / "tiny", sizes=(SIZE,))

    def test_what_it_was_built_for_is_taken(self, bundle, tensorrt):
        check_machine(bundle, tensorrt, RTX5090)
        check_machine(bundle, tensorrt, Machine("", (12, 0), "580.105"))  # newer, though not as a string

    def test_another_version_is_named_with_ours(self, bundle, tensorrt):
        tensorrt.version = "1.8.0.1"
        sentence = self.refusal(bundle, tensorrt, RTX5090)
        assert f"tensorrt-rtx {VERSION}" in sentence
        assert "tensorrt-rtx 1.8.0.1 is installed" in sentence

    def test_the_other_package_of_the_same_version_is_refused(self, bundle):
        assert f"tensorrt {VERSION}" in self.refusal(bundle, fake_tensorrt(DECODER, "tensorrt"), RTX5090)

    def test_another_gpu_is_refused_with_both_capabilities(self, bundle, tensorrt):
        sentence = self.refusal(bundle, tensorrt, Machine("NVIDIA H200", (9, 0), "590.1"))
        assert "capability 12.0" in sentence
        assert "NVIDIA H200 has compute capability 9.0" in sentence

    def test_an_older_driver_is_refused_with_both_versions(self, bundle, tensorrt):
        sentence = self.refusal(bundle, tensorrt, Machine("", (12, 0), "575.200.01"))
        assert "580.95.05" in sentence
        assert "575.200.01" in sentence

    def test_a_driver_that_does_not_tell_is_taken_and_logged(self, bundle, tensorrt, caplog):
        check_machine(bundle, tensorrt, Machine("", (12, 0), None))
        assert "580.95.05" in caplog.text

    def test_a_build_without_a_driver_asks_for_none(self, tmp_path, tensorrt):
        built = {"kind": "tensorrt", "package": "tensorrt-rtx", "version": VERSION, "compute_capability": (12, 0)}
        bundle = engine_bundle(tmp_path / "tiny", sizes=(SIZE,), runtime=built)
        check_machine(bundle, tensorrt, Machine("", (12, 0), "1.0"))

    def test_nothing_is_deserialised_on_the_wrong_machine(self, bundle, tensorrt, monkeypatch):
        monkeypatch.setattr(Machine, "of", lambda device: Machine("NVIDIA H200", (9, 0), "590.1"))
        monkeypatch.setattr(tensorrt_runtime, "find", lambda package: tensorrt)
        monkeypatch.setattr(tensorrt, "load", lambda path: pytest.fail("an engine was loaded"))
        with pytest.raises(BundleError, match=r"9\.0"):
            open_engines(bundle, CPU, 1)

    def test_a_cpu_is_told_what_it_could_run(self, bundle):
        with pytest.raises(ConfigError, match="for cpu"):
            open_runtime(bundle, "cpu")

    def test_there_is_nothing_for_pytorch_to_compile(self, bundle):
        with pytest.raises(ConfigError, match="compiled already"):
            open_runtime(bundle, "cpu", compiled=True)


class TestPackage:
    @pytest.fixture(autouse=True)
    def _forget(self):
        find.cache_clear()
        yield
        find.cache_clear()

    def test_one_that_is_missing_is_named_as_pip_names_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(ConfigError, match="pip install tensorrt-rtx"):
            find("tensorrt-rtx")

    @pytest.mark.parametrize("failure", ["import no_such_bindings", "raise OSError('libnvinfer.so.11 not found')"])
    def test_one_that_does_not_load_says_why(self, monkeypatch, tmp_path, failure: str):
        (tmp_path / "tensorrt.py").write_text(failure)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        with pytest.raises(ConfigError, match=r"does not load: .*(no_such_bindings|libnvinfer)"):
            find("tensorrt")

    def test_its_version_is_the_modules(self, monkeypatch):
        module = ModuleType("tensorrt")
        module.__dict__.update(vars(FakeModule), __version__="11.4.0.1")
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        assert (find("tensorrt").version, find("tensorrt").compiles_on_device) == ("11.4.0.1", False)

    def test_its_log_goes_to_ours_and_its_last_error_into_sentences(self, tensorrt, tmp_path, caplog):
        (tmp_path / "broken.engine").write_text("no plan")
        with pytest.raises(BundleError, match=r"broken.engine: Magic tag") as caught:
            tensorrt.load(tmp_path / "broken.engine")
        assert f"tensorrt-rtx {VERSION}" in str(caught.value)
        assert [(record.levelno, record.message) for record in caplog.records] == [
            (logging.ERROR, "Magic tag does not match.")
        ]


class TestEngineTensors:
    """An engine whose inputs and outputs are not the network's would read and write past its buffers."""

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda tensors: tensors.pop("sigma"), "sigma"),
            (lambda tensors: tensors.update(extra=["INPUT", "FLOAT", [-1]]), "extra"),
            (lambda tensors: tensors.update(x=["INPUT", "FLOAT", [-1, 3, 64, 65]]), r"\[-1, 3, 64, 64\]"),
            (lambda tensors: tensors.update(x=["INPUT", "HALF", [-1, 3, 64, 64]]), "float16.*float32"),
            (lambda tensors: tensors.update(noise=["INPUT", "FP4", [-1, 3, 64, 64]]), "None.*float32"),
            (lambda tensors: tensors.update(next_x=["INPUT", "FLOAT", [-1, 3, 64, 64]]), "input.*output"),
            (lambda tensors: tensors.update(sigma=["INPUT", "FLOAT", []]), "sigma"),
        ],
    )
    def test_a_difference_is_told(self, tmp_path, tensorrt, change: Callable, told: str):
        def alter(engine: dict) -> None:
            if engine["graph"] == "step":
                change(engine["tensors"])

        with pytest.raises(BundleError, match=rf"step-64x64\.engine .*{told}"):
            make_stages(tmp_path, tensorrt, alter)

    def test_a_profile_too_small_for_the_batch_is_told(self, tmp_path, tensorrt):
        with pytest.raises(BundleError, match="batches of 1 to 2, not of 1 to 3"):
            make_stages(tmp_path, tensorrt, lambda engine: engine.update(batch=2))

    def test_tokens_travel_in_the_bundles_precision(self, tmp_path, tensorrt):
        quantised = {"layers": 1, "calibration": "", "synthetic": True, "velocity_error": 0.01, "image_psnr": 40.0}
        stages = make_stages(tmp_path, tensorrt, precision="fp8", quantisation=quantised)
        assert stages.dtype == torch.bfloat16
        assert stages._tensors["step", SIZE]["tokens_0"].dtype == torch.bfloat16

    def test_the_layer_information_is_there_to_look_into(self, tmp_path, tensorrt):
        engine = make_stages(tmp_path, tensorrt)._engines["step", SIZE]
        assert json.loads(engine.layers()) == {"Layers": ["step"]}


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (FakeModule, None),
        (FakeRuntime, "Runtime"),
        (FakeEngine, "ICudaEngine EngineInspector"),
        (FakeContext, "IExecutionContext"),
        (FakeRuntimeConfig, "IRuntimeConfig"),
        (FakeRuntimeCache, "IRuntimeCache"),
    ],
)
def test_the_fake_has_nothing_that_the_real_one_lacks(fake: type, real: str | None):
    module = find("tensorrt-rtx").module
    known = {
        name for kind in ([module] if real is None else map(module.__dict__.get, real.split())) for name in dir(kind)
    }
    used = {name for name, value in vars(fake).items() if not name.startswith("_") and name not in OWN}
    assert used
    assert used <= known
    for enum in ("TensorIOMode", "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        assert {member.name for member in getattr(FakeModule, enum)} <= set(getattr(module, enum).__members__)
    assert {member.name for member in DataType} <= set(module.DataType.__members__)


@pytest.mark.parametrize("graph", ["condition", "step"])
def test_what_is_exported_is_what_the_runtime_expects(tmp_path, graph: str):
    """As the real parser sees it: no GPU is needed to read a graph."""
    module = find("tensorrt-rtx").module
    export(DECODER, graph, WIDE, 5, 3, tmp_path)
    network = module.Builder(find("tensorrt-rtx").logger).create_network(0)
    parser = module.OnnxParser(network, find("tensorrt-rtx").logger)
    assert parser.parse_from_file(str(tmp_path / f"{graph}-64x96.onnx"))
    tensors = [(True, network.get_input(i)) for i in range(network.num_inputs)]
    tensors += [(False, network.get_output(i)) for i in range(network.num_outputs)]
    names = {torch.float32: "FLOAT", torch.int64: "INT64"}
    expected = expected_tensors(manifest(), graph, WIDE)
    assert {tensor.name: (is_input, tensor.dtype.name, tuple(tensor.shape)) for is_input, tensor in tensors} == {
        name: (spec.input, names[spec.dtype], spec.shape) for name, spec in expected.items()
    }


class TestMemory:
    def test_each_graph_size_and_batch_has_a_context_of_its_own(self, tmp_path, tensorrt):
        make_runtime(tmp_path, tensorrt).warm_up()
        made = [(c.engine.plan["graph"], tuple(c.engine.plan["size"]), c.shapes) for c in contexts(tensorrt)]
        steps = [(size, shapes["x"]) for graph, size, shapes in made if graph == "step"]
        assert sorted(steps) == [(size, (batch, 3, *size)) for size in (SIZE, WIDE) for batch in (1, 2, 3)]
        conditions = [(size, shapes) for graph, size, shapes in made if graph == "condition"]
        assert conditions == [
            (size, {"latent": (1, 16, size[0] // 32, size[1] // 32), "caption": (1, 5, 24)}) for size in (SIZE, WIDE)
        ]

    def test_all_share_the_activations_of_the_largest(self, tmp_path, tensorrt):
        make_runtime(tmp_path, tensorrt).warm_up()
        needs = {context.engine.device_memory_size_v2 for context in contexts(tensorrt)}
        assert len(needs) == 2
        assert len({context.memory for context in contexts(tensorrt)}) == 1
        assert contexts(tensorrt)[0].memory[1] == max(needs)

    def test_all_sizes_and_batches_share_one_buffer_for_each_tensor(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        for size in (SIZE, WIDE):
            slots = [runtime.start(Sample(torch.randn(16, size[0] // 32, size[1] // 32), size)) for _ in range(3)]
            for batch in (1, 2, 3):
                runtime.step(slots[:batch], [0] * batch)
            for slot in slots:
                runtime.release(slot)
        ran = [context.addresses for context in contexts(tensorrt) if context.addresses]
        assert len(ran) == 8
        for name in {name for addresses in ran for name in addresses}:
            assert len({addresses[name] for addresses in ran if name in addresses}) == 1

    def test_buffers_do_not_overlap_each_other_or_the_activations(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        slot = runtime.start(Sample(torch.randn(16, 2, 3), WIDE))
        runtime.step([slot], [0])
        largest = next(c for c in contexts(tensorrt) if c.addresses.get("x") and c.shapes["x"][2:] == WIDE)
        pieces = [largest.memory]
        for name, address in largest.addresses.items():
            spec = runtime.stages._tensors["step", WIDE][name]
            pieces.append((address, torch.Size(spec.shape[1:]).numel() * spec.dtype.itemsize))
        pieces.sort()
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(pieces))

    def test_a_buffer_that_moved_is_an_error_and_no_picture(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        slot = runtime.start(Sample(torch.randn(16, 2, 2), SIZE))
        runtime.step([slot], [0])
        kept, runtime._step_noise = runtime._step_noise, runtime._step_noise.clone()
        with pytest.raises(DecodeError, match=r"noise moved .* warm up again"):
            runtime.step([slot], [1])
        runtime._step_noise = kept
        runtime.step([slot], [1])

    def test_warming_up_again_begins_anew(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        for _ in range(2):
            runtime.warm_up()
            slot = runtime.start(Sample(torch.randn(16, 2, 2), SIZE))
            runtime.step([slot], [0])
            runtime.release(slot)
        assert len(contexts(tensorrt)) == 16

    def test_a_run_that_tensorrt_refuses_fails_that_decode(self, tmp_path, tensorrt, monkeypatch):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(DecodeError, match=r"condition-64x64\.engine"):
            runtime.start(Sample(torch.randn(16, 2, 2), SIZE))

    def test_no_room_for_a_context_is_out_of_memory(self, tmp_path, tensorrt, monkeypatch):
        monkeypatch.setattr(FakeEngine, "create_execution_context", lambda self, argument: None)
        with pytest.raises(DeviceMemoryError, match=r"condition-64x64\.engine"):
            make_runtime(tmp_path, tensorrt).warm_up()


class TestKernels:
    """What TensorRT for RTX compiles at the first start is there at the second."""

    def test_a_second_start_compiles_nothing(self, tmp_path, tensorrt):
        make_runtime(tmp_path / "bundles", tensorrt).warm_up()
        assert tensorrt.module.compiled == 4
        again = fake_tensorrt(DECODER)
        bundle = engine_bundle(tmp_path / "again", sizes=(SIZE, WIDE))
        kernels = KernelCache(tmp_path / "bundles" / "tiny.kernels")
        runtime = DeviceRuntime(TensorRTBackend(bundle, again, CPU, 3, kernels), torch.zeros(5, 24), INFO)
        before = kernels.path.stat().st_mtime_ns
        runtime.warm_up()
        assert again.module.compiled == 0
        assert kernels.path.stat().st_mtime_ns == before  # nothing new, nothing written

    @pytest.mark.parametrize("content", [b"damaged", b'["1.6.0", "step"]'])
    def test_what_does_not_fit_is_told_and_replaced(self, tmp_path, tensorrt, caplog, content: bytes):
        path = tmp_path / "tiny.kernels"
        path.write_bytes(content)
        make_runtime(tmp_path, tensorrt).warm_up()
        assert "compiled anew" in caplog.text
        assert json.loads(path.read_bytes())[0] == VERSION

    def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(self, tmp_path, tensorrt, caplog):
        stages = make_stages(tmp_path, tensorrt)
        stages._kernels = KernelCache(tmp_path / "no such folder" / "kernels")
        DeviceRuntime(stages, torch.zeros(5, 24), INFO).warm_up()
        assert "not kept for the next start" in caplog.text

    def test_each_kind_of_gpu_has_its_own_beside_the_bundle(self, tmp_path):
        path = kernel_file(tmp_path / "bundle", "NVIDIA GeForce RTX 5090")
        assert path == tmp_path / "bundle.nvidia-geforce-rtx-5090.kernels"
        assert path != kernel_file(tmp_path / "bundle", "NVIDIA GeForce RTX 5080")

    def test_full_tensorrt_has_none(self, tmp_path):
        tensorrt = fake_tensorrt(DECODER, "tensorrt")
        bundle = engine_bundle(tmp_path / "tiny", sizes=(SIZE, WIDE))
        DeviceRuntime(TensorRTBackend(bundle, tensorrt, CPU, 3, None), torch.zeros(5, 24), INFO).warm_up()
        assert len(contexts(tensorrt)) == 8
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
