"""Compiled engines: checks against machine and manifest, shared memory, fixed addresses, and the kernel cache.

The tests use a fake TensorRT, so that they run without a GPU.
"""

import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines.bundle import Bundle
from engines.code_cache import choose_code_cache
from engines.compile.export import export
from engines.errors import BundleError, ConfigError, DecodeError, DeviceMemoryError
from engines.pid import PidDecoder, fold
from engines.pid.graphs import TABLES, tensor_specs, varying_specs
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime import tensorrt_runtime
from engines.runtime.buffers import DeviceBuffers, Needs
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.open import open_runtime, runtime_info
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.slots import LazyGather
from engines.runtime.tensorrt_runtime import (
    Machine,
    TensorRTBackend,
    check_machine,
    kernel_file,
    open_engines,
)
from engines.runtime.torch_runtime import TorchBackend
from engines.runtime.trt import KernelCache, TensorRT, import_package
from engines.runtime.weight_memory import WeightPool
from engines.size import Size
from tests.engines.runtime import runtimes
from tests.engines.runtime.fake_tensorrt import VERSION, FakeContext, FakeEngine, engine_bundle, fake_tensorrt
from tests.tiny import TINY, manifest

SIZE, WIDE = Size(64, 64), Size(64, 96)
DECODER = fold(PidDecoder(TINY), MODEL_TIMESTEPS)
CPU = torch.device("cpu")
RTX5090 = Machine("NVIDIA GeForce RTX 5090", (12, 0), "580.95.05")
INFO = replace(runtimes.INFO, slots=3, kind="tensorrt")


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="engines.runtime.trt")  # build_engines.py may have silenced it


@pytest.fixture
def tensorrt() -> TensorRT:
    return fake_tensorrt(DECODER)


def make_backend(
    folder: Path, tensorrt: TensorRT, alter: Callable | None = None, kernels: KernelCache | None = None, **changes
) -> TensorRTBackend:
    bundle = engine_bundle(folder / "tiny", alter=alter, **{"sizes": (SIZE, WIDE), **changes})
    return TensorRTBackend(bundle, tensorrt, CPU, kernels or KernelCache(folder / "tiny.kernels"))


def prepare(backend: TensorRTBackend, info: RuntimeInfo) -> None:
    """Prepare a backend on its own."""
    buffers = DeviceBuffers(CPU)
    buffers.reserve(Needs(1, backend.buffer_counts(info)))
    backend.prepare(info, buffers)


def make_runtime(folder: Path, tensorrt: TensorRT) -> DeviceRuntime:
    return DeviceRuntime(make_backend(folder, tensorrt), torch.zeros(5, 24), INFO)


def make_sample(size: Size) -> Sample:
    return Sample(torch.randn(16, *INFO.latent_size(size)), size)


def contexts(tensorrt: TensorRT) -> list[FakeContext]:
    return tensorrt.module.contexts


class TestMachine:
    def mismatch(self, bundle: Bundle, tensorrt: TensorRT, machine: Machine) -> str:
        """Check a machine, which must fail, and return the message."""
        with pytest.raises(BundleError) as caught:
            check_machine(bundle, tensorrt, machine)
        assert str(bundle.path) in str(caught.value)
        return str(caught.value)

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return engine_bundle(tmp_path / "tiny", sizes=(SIZE,))

    def test_the_machine_that_the_engines_were_built_for_is_accepted(self, bundle, tensorrt):
        check_machine(bundle, tensorrt, RTX5090)
        check_machine(bundle, tensorrt, Machine("", (12, 0), "580.105"))  # a newer driver, although not in string order

    def test_the_message_has_both_versions(self, bundle, tensorrt):
        tensorrt.version = "1.8.0.1"
        message = self.mismatch(bundle, tensorrt, RTX5090)
        assert f"tensorrt-rtx {VERSION}" in message
        assert "tensorrt-rtx 1.8.0.1 is installed" in message

    def test_the_other_package_of_the_same_version_is_rejected(self, bundle):
        assert f"tensorrt {VERSION}" in self.mismatch(bundle, fake_tensorrt(DECODER, "tensorrt"), RTX5090)

    def test_the_message_has_both_compute_capabilities(self, bundle, tensorrt):
        message = self.mismatch(bundle, tensorrt, Machine("NVIDIA H200", (9, 0), "590.1"))
        assert "capability 12.0" in message
        assert "NVIDIA H200 has compute capability 9.0" in message

    def test_the_message_for_an_older_driver_has_both_versions(self, bundle, tensorrt):
        message = self.mismatch(bundle, tensorrt, Machine("", (12, 0), "575.200.01"))
        assert "driver 580.95.05 or newer" in message
        assert "575.200.01" in message

    def test_an_unknown_driver_is_accepted_and_logged(self, bundle, tensorrt, caplog):
        check_machine(bundle, tensorrt, Machine("", (12, 0), None))
        assert "580.95.05" in caplog.text

    def test_a_bundle_built_without_a_driver_accepts_any(self, tmp_path, tensorrt):
        built = {"kind": "tensorrt", "package": "tensorrt-rtx", "version": VERSION, "compute_capability": (12, 0)}
        bundle = engine_bundle(tmp_path / "tiny", sizes=(SIZE,), runtime=built)
        check_machine(bundle, tensorrt, Machine("", (12, 0), "1.0"))

    def test_no_engine_is_deserialised_on_the_wrong_machine(self, bundle, tensorrt, monkeypatch):
        monkeypatch.setattr(Machine, "of", lambda device: Machine("NVIDIA H200", (9, 0), "590.1"))
        monkeypatch.setattr(tensorrt_runtime, "import_package", lambda package: tensorrt)
        monkeypatch.setattr(tensorrt, "load", lambda name, content: pytest.fail("an engine was loaded"))
        with pytest.raises(BundleError, match=r"9\.0"):
            open_engines(bundle, CPU)

    def test_the_message_for_a_cpu_suggests_a_bundle_for_it(self, bundle):
        with pytest.raises(ConfigError, match="built for the target cpu"):
            open_runtime(bundle, "cpu")

    def test_torch_compile_is_rejected(self, bundle):
        with pytest.raises(ConfigError, match="do not support --compile"):
            open_runtime(bundle, "cpu", compiled=True)

    def test_a_choice_of_kernels_is_rejected(self, bundle):
        with pytest.raises(ConfigError, match="have their own kernels; omit --kernels"):
            open_runtime(bundle, "cpu", kernels="pytorch")

    def test_a_pool_for_weights_is_rejected(self, bundle):
        with pytest.raises(ConfigError, match="whose weights cannot move to host memory"):
            open_runtime(bundle, "cpu", weights=WeightPool(CPU, resident=1))


class TestEngineTensors:
    """An engine with unexpected inputs or outputs would access memory outside its buffers."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("sigma"), "sigma"),
            (lambda tensors: tensors.update(extra=["INPUT", "FLOAT", [-1]]), "extra"),
            (lambda tensors: tensors.update(x=["INPUT", "FLOAT", [-1, 3, 64, -1]]), r"\[-1, 3, -1, -1\]"),
            (lambda tensors: tensors.update(x=["INPUT", "HALF", [-1, 3, -1, -1]]), "float16.*float32"),
            (lambda tensors: tensors.update(noise=["INPUT", "FP4", [-1, 3, -1, -1]]), "None.*float32"),
            (lambda tensors: tensors.update(next_x=["INPUT", "FLOAT", [-1, 3, -1, -1]]), "input.*output"),
            (lambda tensors: tensors.update(sigma=["INPUT", "FLOAT", []]), "sigma"),
        ],
    )
    def test_an_unexpected_tensor_is_an_error(self, tmp_path, tensorrt, change: Callable, message: str):
        def alter(engine: dict) -> None:
            if engine["graph"] == "step":
                change(engine["tensors"])

        with pytest.raises(BundleError, match=rf"step\.engine .*{message}"):
            make_backend(tmp_path, tensorrt, alter)

    def test_a_profile_too_small_for_the_batch_is_an_error(self, tmp_path, tensorrt):
        def alter(engine: dict) -> None:
            if engine["graph"] == "step":
                engine["profiles"][1] = {**engine["profiles"][1], "sigma": [[1], [1], [2]]}

        with pytest.raises(BundleError, match=r"supports sigma of \[1\] to \[2\] for 64x96, not of \[1\] to \[3\]"):
            make_backend(tmp_path, tensorrt, alter)

    def test_a_missing_profile_is_an_error(self, tmp_path, tensorrt):
        with pytest.raises(BundleError, match="no profile for 64x96"):
            make_backend(tmp_path, tensorrt, lambda engine: engine["profiles"].pop())

    def test_tokens_have_the_dtype_of_the_bundles_precision(self, tmp_path, tensorrt):
        quantised = {"layers": 1, "calibration": "", "synthetic": True, "velocity_error": 0.01, "image_psnr": 40.0}
        precision = {"precision": "fp8", "quantisation": quantised}
        assert make_backend(tmp_path, tensorrt, **precision).dtype == torch.bfloat16

    def test_the_layer_information_is_available(self, tmp_path, tensorrt):
        assert json.loads(make_backend(tmp_path, tensorrt).layers("step")) == {"Layers": ["step"]}


@pytest.mark.parametrize("graph", ["condition", "step"])
def test_the_exported_graph_has_the_expected_tensors(tmp_path, graph: str):
    """TensorRT's parser needs no GPU."""
    module = import_package("tensorrt-rtx").module
    export(DECODER, graph, WIDE, 5, 3, tmp_path)
    network = module.Builder(import_package("tensorrt-rtx").logger).create_network(0)
    parser = module.OnnxParser(network, import_package("tensorrt-rtx").logger)
    assert parser.parse_from_file(str(tmp_path / f"{graph}.onnx"))
    tensors = [(True, network.get_input(i)) for i in range(network.num_inputs)]
    tensors += [(False, network.get_output(i)) for i in range(network.num_outputs)]
    names = {torch.float32: "FLOAT", torch.int64: "INT64"}
    expected = varying_specs(graph, TINY, torch.float32, 5)
    assert {tensor.name: (is_input, tensor.dtype.name, tuple(tensor.shape)) for is_input, tensor in tensors} == {
        name: (spec.input, names[spec.dtype], spec.shape) for name, spec in expected.items()
    }


class TestMemory:
    def test_each_graph_size_and_batch_has_its_own_context(self, tmp_path, tensorrt):
        make_runtime(tmp_path, tensorrt).warm_up()
        created = [(c.engine.plan["graph"], c.profile, c.shapes) for c in contexts(tensorrt)]
        steps = [(profile, shapes["x"]) for graph, profile, shapes in created if graph == "step"]
        sizes = list(enumerate((SIZE, WIDE)))
        assert sorted(steps) == [(profile, (batch, 3, *size)) for profile, size in sizes for batch in (1, 2, 3)]
        conditions = [(profile, shapes) for graph, profile, shapes in created if graph == "condition"]
        assert conditions == [
            (profile, {"latent": (1, 16, *INFO.latent_size(size)), "caption": (1, 5, 24)}) for profile, size in sizes
        ]

    def test_all_contexts_of_a_graph_share_one_engine(self, tmp_path, tensorrt):
        make_runtime(tmp_path, tensorrt).warm_up()
        assert len({id(context.engine) for context in contexts(tensorrt)}) == 2

    def test_all_contexts_share_the_activation_memory_of_the_largest(self, tmp_path, tensorrt):
        make_runtime(tmp_path, tensorrt).warm_up()
        required = {context.update_device_memory_size_for_shapes() for context in contexts(tensorrt)}
        assert len(required) > 2
        assert len({context.memory for context in contexts(tensorrt)}) == 1
        assert contexts(tensorrt)[0].memory[1] == max(required)

    def test_all_sizes_and_batches_share_one_buffer_per_tensor(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        for size in (SIZE, WIDE):
            slots = [runtime.start(make_sample(size)) for _ in range(3)]
            for batch in (1, 2, 3):
                runtime.step(slots[:batch], [0] * batch)
            for slot in slots:
                runtime.release(slot)
        used = [context.addresses for context in contexts(tensorrt) if context.addresses]
        assert len(used) == 8
        for name in {name for addresses in used for name in addresses}:
            sizes = 2 if name in TABLES else 1  # each size has its own position tables
            assert len({addresses[name] for addresses in used if name in addresses}) == sizes

    def test_buffers_and_activation_memory_do_not_overlap(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        slot = runtime.start(make_sample(WIDE))
        runtime.step([slot], [0])
        largest = next(c for c in contexts(tensorrt) if c.addresses.get("x") and c.shapes["x"][2:] == WIDE)
        pieces = [largest.memory]
        specs = tensor_specs("step", TINY, torch.float32, WIDE, 5, 1)
        for name, address in largest.addresses.items():
            spec = specs[name]
            pieces.append((address, torch.Size(spec.shape).numel() * spec.dtype.itemsize))
        pieces.sort()
        assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(pieces))

    def test_a_buffer_that_moved_is_an_error_instead_of_an_image(self, tmp_path, tensorrt):
        backend = make_backend(tmp_path, tensorrt)
        prepare(backend, INFO)
        index, noise = torch.zeros(1, dtype=torch.long), torch.randn(1, 3, *SIZE)

        @torch.inference_mode()
        def step(noise: torch.Tensor) -> torch.Tensor:
            x, caption = torch.zeros(1, 3, *SIZE), torch.zeros(1, 5, TINY.hidden_size)
            tokens = [torch.zeros(1, SIZE.height // 16, SIZE.width // 16, TINY.hidden_size)] * TINY.token_sets
            return backend.step(SIZE, x, torch.zeros(1), index, noise, caption, LazyGather(tokens, index)).clone()

        expected = step(noise)
        with pytest.raises(DecodeError, match=r"noise moved .* warm up again"):
            step(noise.clone())
        assert torch.equal(step(noise), expected)

    def test_a_second_warm_up_creates_everything_again(self, tmp_path, tensorrt):
        runtime = make_runtime(tmp_path, tensorrt)
        for _ in range(2):
            runtime.warm_up()
            slot = runtime.start(make_sample(SIZE))
            runtime.step([slot], [0])
            runtime.release(slot)
        assert len(contexts(tensorrt)) == 16

    def test_a_failed_execution_is_a_decode_error(self, tmp_path, tensorrt, monkeypatch):
        runtime = make_runtime(tmp_path, tensorrt)
        runtime.warm_up()
        monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(DecodeError, match=r"condition\.engine"):
            runtime.start(make_sample(SIZE))

    def test_a_context_that_cannot_be_created_is_out_of_memory(self, tmp_path, tensorrt, monkeypatch):
        monkeypatch.setattr(FakeEngine, "create_execution_context", lambda self, argument: None)
        with pytest.raises(DeviceMemoryError, match=r"condition\.engine"):
            make_runtime(tmp_path, tensorrt).warm_up()


RANGE = {"smallest_side": 32, "largest_side": 128}


class TestSizes:
    """A range of sizes is one more profile, for sizes that were not listed when the bundle was built."""

    INSIDE, OUTSIDE = Size(32, 128), Size(32, 160)

    def test_a_size_in_the_range_is_decoded_as_pytorch_does(self, tmp_path, tensorrt):
        info = replace(INFO, sizes=(self.INSIDE, SIZE))
        images = []
        for backend in (make_backend(tmp_path, tensorrt, size_range=RANGE), TorchBackend(DECODER)):
            runtime = DeviceRuntime(backend, torch.zeros(5, 24), info)
            runtime.warm_up()
            images.append(runtimes.decode(runtime, runtimes.make_sample(3, self.INSIDE)))
        assert (images[0] == images[1]).all()
        profiles = {(context.profile, context.shapes.get("x", ())[2:]) for context in contexts(tensorrt)}
        assert profiles >= {(0, SIZE), (2, self.INSIDE)}

    def test_only_the_sizes_that_are_used_need_memory(self, tmp_path, tensorrt):
        backend = make_backend(tmp_path, tensorrt, size_range=RANGE)
        prepare(backend, replace(INFO, sizes=(SIZE,)))
        small = contexts(tensorrt)[0].memory[1]
        prepare(backend, replace(INFO, sizes=(Size(128, 128),)))
        assert contexts(tensorrt)[-1].memory[1] > 3 * small

    def test_any_size_within_the_profiles_can_be_selected(self, tmp_path):
        bundle = engine_bundle(tmp_path / "tiny", sizes=(SIZE, WIDE), size_range=RANGE)
        info = runtime_info(bundle, CPU, None, None, [self.INSIDE, WIDE, self.INSIDE])
        assert info.sizes == (self.INSIDE, WIDE)
        assert runtime_info(bundle, CPU, None, None).sizes == (SIZE, WIDE)
        with pytest.raises(ConfigError, match="The engines support 64x64, 64x96, 32x32 to 128x128, not 32x160"):
            runtime_info(bundle, CPU, None, None, [self.OUTSIDE])
        with pytest.raises(ConfigError, match="multiples of 32"):
            runtime_info(bundle, CPU, None, None, [Size(48, 64)])

    @pytest.mark.parametrize(
        ("size_range", "message"),
        [
            ({"smallest_side": 64, "largest_side": 64}, "is empty: its first side must be smaller"),
            ({"smallest_side": 33, "largest_side": 64}, "multiples of 32"),
            ({"smallest_side": 32, "largest_side": 32768}, "less than or equal to 16384"),
        ],
    )
    def test_an_impossible_range_is_an_error(self, size_range: dict[str, int], message: str):
        with pytest.raises(ValueError, match=message):
            engine_bundle(Path(), sizes=(SIZE,), size_range=size_range)

    def test_pytorch_bundles_have_no_range(self):
        with pytest.raises(ValueError, match="has a size range, but the runtime torch"):
            manifest(size_range=RANGE)


def hashed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


class TestKernels:
    """Kernels that TensorRT for RTX compiles at the first start are loaded at the second."""

    def test_a_second_start_compiles_no_kernels(self, tmp_path, tensorrt):
        make_runtime(tmp_path / "bundles", tensorrt).warm_up()
        assert tensorrt.module.compiled == 4
        again = fake_tensorrt(DECODER)
        bundle = engine_bundle(tmp_path / "again", sizes=(SIZE, WIDE))
        path = tmp_path / "bundles" / "tiny.kernels"
        kernels = KernelCache(path)
        runtime = DeviceRuntime(TensorRTBackend(bundle, again, CPU, kernels), torch.zeros(5, 24), INFO)
        before = path.stat().st_ino
        runtime.warm_up()
        assert again.module.compiled == 0
        assert path.stat().st_ino == before  # no new kernels, so the file was not replaced

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda content: b"", "damaged"),
            (lambda content: content[:-1], "damaged"),
            (lambda content: content[:40] + b"x" + content[41:], "damaged"),
            (lambda content: hashed(b'["1.6.0", "step"]'), "different GPU, driver or TensorRT version"),
        ],
        ids=["empty", "truncated", "altered", "other version"],
    )
    def test_an_unusable_cache_is_logged_and_replaced(self, tmp_path, tensorrt, caplog, damage, reason: str):
        make_runtime(tmp_path / "first", tensorrt).warm_up()
        intact = (tmp_path / "first" / "tiny.kernels").read_bytes()
        path = tmp_path / "tiny.kernels"
        path.write_bytes(damage(intact))
        again = fake_tensorrt(DECODER)
        make_runtime(tmp_path, again).warm_up()
        assert reason in caplog.text
        assert "recompiling all kernels" in caplog.text
        assert again.module.compiled == 4
        assert path.read_bytes() == intact == hashed(intact[32:])

    def test_an_engine_altered_after_opening_is_rejected(self, tmp_path, tensorrt):
        bundle = engine_bundle(tmp_path / "tiny", sizes=(SIZE, WIDE))
        path = bundle.file(bundle.manifest.engines[-1].file)
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
        with pytest.raises(BundleError, match="SHA-256"):
            TensorRTBackend(bundle, tensorrt, CPU, None)

    def test_a_cache_that_cannot_be_written_is_only_logged(self, tmp_path, tensorrt, caplog):
        backend = make_backend(tmp_path, tensorrt, kernels=KernelCache(tmp_path / "no such folder" / "kernels"))
        DeviceRuntime(backend, torch.zeros(5, 24), INFO).warm_up()
        assert "cannot write the kernel cache" in caplog.text

    def test_without_a_writable_directory_kernels_are_kept_in_memory_only(self, tmp_path, tensorrt, caplog):
        caplog.set_level("INFO")
        backend = make_backend(tmp_path, tensorrt, kernels=KernelCache(None))
        DeviceRuntime(backend, torch.zeros(5, 24), INFO).warm_up()
        assert tensorrt.module.compiled == 4
        assert "kernel cache" not in caplog.text

    def test_a_file_in_use_is_not_deleted_as_unused(self, tmp_path, tensorrt):
        make_runtime(tmp_path / "first", tensorrt).warm_up()
        kernels = KernelCache(tmp_path / "first" / "tiny.kernels")
        os.utime(tmp_path / "first" / "tiny.kernels", (0, 0))
        backend = make_backend(tmp_path / "second", fake_tensorrt(DECODER), kernels=kernels)
        DeviceRuntime(backend, torch.zeros(5, 24), INFO).warm_up()
        assert (tmp_path / "first" / "tiny.kernels").stat().st_mtime > 0

    def test_processes_that_save_at_the_same_time_leave_one_complete_file(self, tmp_path, tensorrt):
        folders = [tmp_path / name for name in ("a", "b")]
        path = tmp_path / "shared.kernels"
        backends = [make_backend(folder, fake_tensorrt(DECODER), kernels=KernelCache(path)) for folder in folders]
        runtimes_ = [DeviceRuntime(backend, torch.zeros(5, 24), INFO) for backend in backends]
        threads = [threading.Thread(target=runtime.warm_up) for runtime in runtimes_]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        content = path.read_bytes()
        assert content == hashed(content[32:])
        assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]

    def test_each_bundle_version_gpu_model_and_driver_has_its_own_file(self, tmp_path, tensorrt):
        cache = choose_code_cache(tmp_path / "cache")
        bundle, other = engine_bundle(tmp_path / "a", sizes=(SIZE,)), engine_bundle(tmp_path / "b", sizes=(WIDE,))
        newer = fake_tensorrt(DECODER)
        newer.version = "1.8.0"
        paths = [
            kernel_file(bundle, tensorrt, RTX5090),
            kernel_file(other, tensorrt, RTX5090),
            kernel_file(bundle, newer, RTX5090),
            kernel_file(bundle, tensorrt, replace(RTX5090, device="NVIDIA GeForce RTX 5080")),
            kernel_file(bundle, tensorrt, replace(RTX5090, driver="590.1")),
            kernel_file(bundle, tensorrt, replace(RTX5090, driver=None)),
        ]
        choose_code_cache()
        assert len(set(paths)) == len(paths)
        assert cache.directory is not None
        for path in paths:
            assert path is not None
            assert path.parent == cache.directory / "tensorrt-rtx"
            assert path.name.endswith(".kernels")

    def test_the_package_tensorrt_has_no_kernel_cache(self, tmp_path):
        tensorrt = fake_tensorrt(DECODER, "tensorrt")
        bundle = engine_bundle(tmp_path / "tiny", sizes=(SIZE, WIDE))
        DeviceRuntime(TensorRTBackend(bundle, tensorrt, CPU, None), torch.zeros(5, 24), INFO).warm_up()
        assert len(contexts(tensorrt)) == 8
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
