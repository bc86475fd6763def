"""From a checkpoint to engines: the exported graphs are the network, and what cannot be done here is left for there."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor

import engines.compile.build as build_module
import engines.compile.plan as plan_module
import engines.compile.targets as targets_module
from build_engines import main
from engines.bundle import open_bundle
from engines.compile import verify_fold
from engines.compile import verify_onnx as check_module
from engines.compile.calibrate import calibrate, synthetic_calibration
from engines.compile.compile_engine import compile_engine
from engines.compile.export import ExportError, export
from engines.compile.load import random_decoder
from engines.compile.quantise import choose, linear_layers, share, with_fp8
from engines.compile.targets import TARGETS, find_compiler
from engines.compile.verify_engine import OnStages, fused_attention, one_image
from engines.compile.verify_onnx import GraphError, check, check_kinds, compare, shallow
from engines.pid import FoldedDecoder, PidConfig, fold
from engines.pid.released import DecoderDescription, released
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.torch_runtime import TorchBackend
from tests.tiny import TINY

SIZE = (64, 96)
V15 = replace(TINY, patch_depth=3, pixel_injection=True, gate_per_channel=False, adapter_padding="replicate")


def quiet(_detail: str) -> None:
    pass


def network_of(config: PidConfig) -> FoldedDecoder:
    return fold(random_decoder(config, 0), MODEL_TIMESTEPS)


def largest_inputs(network: FoldedDecoder, pixels: int = 64) -> dict[str, float]:
    layers = [layer for layer, rule in choose(linear_layers(network), ()).items() if rule.fp8]
    samples = synthetic_calibration(network.config)
    cells = max(1, pixels // network.config.cell_side)
    small = replace(samples, samples=tuple(replace(s, latent=s.latent[:, :cells, :cells]) for s in samples.samples[:2]))
    caption = torch.zeros(4, network.config.caption_width)
    return calibrate(network, small, caption, layers, quiet)[0]


class TestExport:
    def test_a_step_takes_any_batch_and_the_graph_holds_every_layer(self, tmp_path: Path):
        network = network_of(V15)
        quantised = share(with_fp8(network, largest_inputs(network)), torch.bfloat16)
        quantised.pixel_memory_budget = 1  # the pixel blocks in as many chunks as there may be
        made = export(quantised, "step", SIZE, 5, 3, tmp_path)
        assert made.operators["Gelu"] == 4 * V15.pixel_depth
        assert made.operators["Attention"] == V15.patch_depth + V15.pixel_depth
        assert made.operators["RMSNormalization"] > 0
        model = onnx.load(made.path, load_external_data=False)
        shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
        assert shapes["x"] == shapes["noise"] == [0, 3, *SIZE]  # 0: the batch is open
        assert shapes["tokens_2"] == [0, 24, 48]
        weights = sum(tensor.nbytes for tensor in quantised.state_dict().values())
        assert made.files[1].stat().st_size < weights + 100_000  # and the position tables

    def test_a_graph_that_lost_a_layer_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        network = network_of(TINY)
        monkeypatch.setattr(FoldedDecoder, "velocity_at", lambda _self, x, rows, conditioning, sigma: x * 0.5)
        with pytest.raises(ExportError, match=r"step graph is not the network: it has .* not "):
            export(network, "step", SIZE, 5, 1, tmp_path)


class TestCheck:
    def test_without_fp8_only_rounding_is_left(self, tmp_path: Path):
        exact, half = check(network_of(V15), None, tmp_path, quiet)
        assert max(exact.velocity_error) < 1e-5
        assert max(half.velocity_error) < 1e-2

    def test_a_graph_that_computes_something_else_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def wrong(session: Callable[[dict[str, Tensor]], list[Tensor]]) -> Callable[[dict[str, Tensor]], list[Tensor]]:
            return lambda inputs: [1.001 * value for value in session(inputs)]

        session = check_module._session
        monkeypatch.setattr(check_module, "_session", lambda path: wrong(session(path)))
        with pytest.raises(GraphError, match="ONNX Runtime and PyTorch differ by"):
            check(network_of(TINY), None, tmp_path, quiet)

    def test_the_shallow_network_is_the_first_and_the_last_block(self):
        network = network_of(V15)
        small, names = shallow(network)
        assert small.config.patch_depth == 2
        assert names["patch_blocks.1.attn.qkv_y"] == "patch_blocks.2.attn.qkv_y"
        probe = verify_fold.make_probe(small.config)
        assert verify_fold.velocities(small, probe).isfinite().all()
        deep = network.get_parameter("patch_blocks.2.mlp_x.w1.weight")
        assert torch.equal(small.get_parameter("patch_blocks.1.mlp_x.w1.weight"), deep)


def test_a_full_width_network_becomes_an_engine_for_the_rtx_5090(tmp_path: Path):
    """All widths of a released decoder, two blocks deep: FP8, ONNX Runtime's parity, and the engine file."""
    config = replace(PidConfig(), patch_depth=2, pixel_depth=1, caption_tokens=16, caption_width=64)
    network = network_of(config)
    largest = largest_inputs(network, pixels=32)
    for result in check_kinds(network, largest, tmp_path, quiet):
        assert max(result.velocity_error) <= result.tolerance

    quantised = share(with_fp8(network, largest), torch.bfloat16)
    size = (256, 256)
    exported = export(quantised, "step", size, config.caption_tokens, 2, tmp_path)
    target = TARGETS["rtx5090"]
    compiler = find_compiler(target, "tensorrt-rtx")
    engine = compile_engine(compiler, target, "step", size, 2, tmp_path, tmp_path / "timings")
    step = {key: tensor for key, tensor in quantised.state_dict().items() if "lq_proj.latent_proj" not in key}
    weights = sum(tensor.nbytes for tensor in step.values())
    assert (tmp_path / "step-256x256.engine").stat().st_size == engine.bytes
    assert weights * 0.9 < engine.bytes < weights * 1.2  # FP8 stays FP8
    assert exported.nbytes < weights * 1.2


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Builds `--decoder tiny`, a released decoder."""
    description = DecoderDescription("tiny", V15, released("flux-2k").latent_space, ((64, 64),), max_side=96)
    monkeypatch.setattr(plan_module, "released", lambda name: description)
    monkeypatch.setattr(build_module, "check", lambda *_: ())  # it has tests of its own, above

    def build(target: str, *options: str) -> int:
        given = ["--decoder", "tiny", "--random-weights", "--target", target, "--output", str(tmp_path / "out")]
        return main([*given, *options])

    return build


class TestBuild:
    def test_the_bundled_decoder_becomes_engines_for_the_rtx_5090(self, tmp_path: Path, capsys):
        """The whole way on its command line, on a machine that needs no GPU."""
        output = tmp_path / "demo"
        options = ["--target", "rtx5090", "--precision", "fp8", "--sizes", "64x64", "--max-batch", "2", "--keep-onnx"]
        assert main(["--decoder", "dct-demo", *options, "--output", str(output)]) == 0
        manifest = open_bundle(output).manifest
        assert manifest.runtime.package == "tensorrt-rtx"
        assert manifest.runtime.compute_capability == (12, 0)
        assert {engine.graph for engine in manifest.engines} == {"condition", "step"}
        assert {"step-64x64.onnx", "step-64x64.onnx.data", "step-64x64.engine"} <= set(manifest.files)
        assert "weights.safetensors" not in manifest.files
        assert any("not run on a GPU yet" in warning for warning in manifest.warnings)
        report = json.loads((output / "report.json").read_text())
        for found in (*report["checks"], *report["network"]["quantisation"]["kinds"]):
            assert max(found["velocity_error"]) <= found["tolerance"]
        assert [path.name for path in tmp_path.iterdir()] == ["demo"]
        assert "engine      step 64x64" in capsys.readouterr().out

    def test_what_another_machine_must_compile_is_left_for_it(
        self, tiny: Callable[..., int], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        assert tiny("gb200") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "tensorrt compiles for it on a machine with a GB200, but this machine has no CUDA device" in said
        folder = tmp_path / "out.build"
        assert f"--resume {folder} goes on with it" in said
        assert (folder / "step-64x64.onnx").is_file()
        assert not (tmp_path / "out").exists()

        # On that machine, elsewhere in the file system, nothing before the compilation is done again.
        there = tmp_path / "there" / "out.build"
        shutil.copytree(folder, there)
        compiler = SimpleNamespace(package="tensorrt", version="11.4.1")
        monkeypatch.setattr(build_module, "find_compiler", lambda _target, _asked: compiler)
        monkeypatch.setattr(build_module, "compile_engine", fake_engine)
        assert main(["--resume", str(there)]) == 0
        stages = [line.split("]")[1].split()[0] for line in capsys.readouterr().err.splitlines()]
        assert set(stages) == {"compile", "write", "done"}
        manifest = open_bundle(there.with_name("out")).manifest
        assert (manifest.runtime.package, manifest.runtime.compute_capability) == ("tensorrt", (10, 0))
        assert not there.exists()

    def test_an_interrupted_build_goes_on_where_it_was(
        self, tiny: Callable[..., int], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "compile_engine", interrupt)
            assert tiny("rtx5090") == 130
        assert "there is no bundle. What is done is kept" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert tiny("rtx5090") == 2
        assert "holds a build that was not finished: go on with --resume" in capsys.readouterr().err
        assert main(["--resume", str(tmp_path / "out.build")]) == 0
        err = capsys.readouterr().err
        assert "load " not in err
        assert "export " not in err
        assert open_bundle(tmp_path / "out").manifest.engines

    def test_a_full_disk_leaves_no_half_bundle(
        self, tiny: Callable[..., int], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        def full(_source: Path, _path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "_link", full)
            assert tiny("cpu") == 2
        said = capsys.readouterr().err
        assert "the disk is full. What is done is kept" in said
        assert [path.name for path in tmp_path.iterdir()] == ["out.build"]
        assert main(["--resume", str(tmp_path / "out.build")]) == 0
        assert open_bundle(tmp_path / "out").manifest.decoder == "tiny"

    def test_too_small_a_disk_is_told_before_any_work(
        self, tiny: Callable[..., int], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
        assert tiny("cpu") == 2
        assert "are free there" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_missing_package_is_named(self, tiny: Callable[..., int], capsys, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(targets_module.tensorrt, "find", missing)
        assert tiny("rtx5090") == 2
        said = capsys.readouterr().err
        assert "tensorrt-rtx is not installed: `pip install tensorrt-rtx` brings it" in said

    def test_resuming_takes_no_other_option(self, tmp_path: Path, capsys):
        with pytest.raises(SystemExit):
            main(["--resume", str(tmp_path), "--precision", "fp8"])
        assert "it takes no --precision" in capsys.readouterr().err
        assert main(["--resume", str(tmp_path)]) == 2
        assert "is not the folder of an unfinished build" in capsys.readouterr().err

    def test_a_dry_run_prints_the_plan_and_does_nothing(self, tmp_path: Path, capsys):
        options = ["--decoder", "flux-2k", "--random-weights", "--precision", "fp8", "--sizes", "2048x2048,1536x2688"]
        assert main([*options, "--target", "h200", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
        plan = capsys.readouterr().out
        assert "1,362 M parameters to 939 M" in plan
        assert "both engines for 1536x2688 by tensorrt" in plan
        assert "a machine with an H200" in plan
        assert "warning: No calibration latents were given" in plan
        assert not list(tmp_path.iterdir())


def fake_engine(_compiler, _target, graph, size, _max_batch, folder: Path, _timings):
    from engines.compile.export import file_name
    from engines.compile.results import EngineResult

    (folder / file_name(graph, size, ".engine")).write_bytes(b"engine")
    return EngineResult(graph=graph, size=size, bytes=6, seconds=0.0)


def missing(package: str):
    from engines.errors import ConfigError

    raise ConfigError(f"{package} is not installed: `pip install {package}` brings it.")


class TestFloor:
    def quantised_badly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import engines.compile.weights as prepare_module

        monkeypatch.setattr(prepare_module, "psnr", lambda *_: 20.0)

    def test_pictures_below_the_floor_are_refused_with_a_way_out(self, tmp_path: Path, capsys, monkeypatch):
        self.quantised_badly(monkeypatch)
        build = ["--decoder", "dct-demo", "--target", "cpu", "--precision", "fp8", "--sizes", "64x64"]
        build += ["--output", str(tmp_path / "out")]
        assert main(build) == 2
        said = capsys.readouterr().err
        assert "20.0 dB from those without, below the floor of 35 dB" in said
        assert "--keep p" in said
        assert not list(tmp_path.iterdir())
        assert main([*build, "--force"]) == 0
        assert any("by force below the quality floor" in w for w in open_bundle(tmp_path / "out").manifest.warnings)


class TestDeviceCheck:
    """What is done on a GPU, between two runtimes on the CPU."""

    SIZE = (64, 64)

    def compared(self, other: FoldedDecoder) -> tuple[tuple[float, ...], float]:
        network = network_of(V15)
        info = RuntimeInfo("tiny", "flux", 16, 8, 4, "flow", 4, 24, (self.SIZE,), 1, 1, "fp32", "torch", "cpu")
        stages = TorchBackend(network), TorchBackend(other)
        for each in stages:
            each.prepare(info)
        inputs = one_image(V15, self.SIZE, torch.zeros(1, 4, 24), torch.device("cpu"))
        return compare(*(OnStages(each, self.SIZE, 4) for each in stages), inputs)

    def test_equal_networks_are_equal(self):
        assert self.compared(network_of(V15)) == ((0.0,) * 4, 99.0)

    def test_a_difference_is_seen_in_velocities_and_picture(self):
        network = network_of(V15)
        errors, psnr = self.compared(with_fp8(network, largest_inputs(network)))
        assert all(1e-3 < error < 0.2 for error in errors)
        assert 10 < psnr < 60

    @pytest.mark.parametrize(("name", "fused"), [("_gemm_mha_v2_0x1", True), ("__myl_SoftMax_MatMul", False)])
    def test_the_layer_information_tells_a_fused_attention(self, name: str, fused: bool):
        information = json.dumps({"Layers": [{"Name": name}]})
        assert fused_attention(SimpleNamespace(layers=lambda _graph: [information])) is fused
