"""Builds with compiled engines: interrupted, resumed, moved to another machine, and rejected."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from build_engines import main
from engines.bundle import open_bundle
from engines.compile import build as build_module
from engines.compile.export import file_name
from engines.compile.inputs.photo_calibration import photo_calibration
from engines.compile.planning import targets
from engines.compile.programs import Program
from engines.compile.results import DeviceResult, EngineResult
from engines.errors import ConfigError
from engines.runtime import trt
from tests.engines.compile.conftest import Build


def fake_engine(_compiler, _target, graph, _shapes, folder: Path, _timings, _program=None) -> EngineResult:
    (folder / file_name(graph, ".engine")).write_bytes(b"engine")
    return EngineResult(graph=graph, bytes=6, seconds=0.0)


def change_target(workspace: Path, target: str) -> None:
    state = json.loads((workspace / "build.json").read_text())
    state["options"]["target"] = target
    (workspace / "build.json").write_text(json.dumps(state))


@pytest.fixture
def workspace(interrupted_build: Path, tmp_path: Path, build_tiny: Build) -> Path:
    """Copy of the workspace of the interrupted build, for the output tmp_path/out."""
    return Path(shutil.copytree(interrupted_build / "out.build", tmp_path / "out.build"))


def stages(stderr: str) -> list[str]:
    return [line.split("]")[1].split()[0] for line in stderr.splitlines() if line.startswith("[")]


class TestResume:
    def test_an_interrupted_build_prints_how_to_continue(self, interrupted_build: Path):
        assert (interrupted_build / "status").read_text() == "130"
        stderr = (interrupted_build / "stderr").read_text()
        assert "interrupted; no bundle was written. To continue the build: python build_engines.py --resume" in stderr
        assert stages(stderr)[-3:] == ["export", "export", "compile"]
        assert not (interrupted_build / "out").exists()

    def test_an_interrupted_build_is_not_started_again_by_mistake(self, build_tiny: Build, workspace: Path, capsys):
        assert build_tiny("rtx5090") == 2
        assert f"contains an interrupted build. Continue it with --resume {workspace}" in capsys.readouterr().err

    def test_a_resumed_build_continues_where_it_was_interrupted(self, workspace: Path, capsys):
        assert main(["--resume", str(workspace)]) == 0
        assert stages(capsys.readouterr().err) == ["compile", "compile", "write", "done"]
        manifest = open_bundle(workspace.with_name("out")).manifest
        assert {engine.graph for engine in manifest.engines} == {"condition", "step"}
        assert manifest.runtime.package == "tensorrt-rtx"
        assert not workspace.exists()

    def test_a_build_continues_on_a_machine_that_can_compile(
        self, workspace: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(targets, "cuda_problem", lambda: "this machine has no NVIDIA GPU")
        change_target(workspace, "gb200")
        assert main(["--resume", str(workspace)]) == 2
        stderr = capsys.readouterr().err.splitlines()[-1]
        assert "tensorrt needs a machine with a GB200, but this machine has no NVIDIA GPU" in stderr
        assert f"To continue the build: python build_engines.py --resume {workspace}" in stderr
        assert (workspace / "step.onnx").is_file()
        assert not (tmp_path / "out").exists()

        # The other machine has another path, and repeats no stage before the compilation.
        moved = tmp_path / "moved" / "out.build"
        shutil.copytree(workspace, moved)
        compiler = SimpleNamespace(package="tensorrt", version="11.4.1")
        monkeypatch.setattr(build_module, "find_compiler", lambda _target, _requested: compiler)
        monkeypatch.setattr(build_module, "compile_engine", fake_engine)
        assert main(["--resume", str(moved)]) == 0
        assert set(stages(capsys.readouterr().err)) == {"compile", "write", "done"}
        manifest = open_bundle(moved.with_name("out")).manifest
        assert (manifest.runtime.package, manifest.runtime.compute_capability) == ("tensorrt", (10, 0))
        assert not moved.exists()

    def test_torch_tensorrt_compiles_without_onnx_files_on_a_machine_with_a_gpu(
        self, build_tiny: Build, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(targets, "cuda_problem", lambda: "this machine has no NVIDIA GPU")
            assert build_tiny("rtx5090", "--compiler", "torch-tensorrt") == 2
        stderr = capsys.readouterr().err
        assert "torch-tensorrt needs a Linux machine (x86-64) with an NVIDIA GPU, but this machine has no" in stderr
        workspace = tmp_path / "out.build"
        assert f"The verified network is in {workspace}: copy this directory" in stderr
        assert "export" not in stages(stderr)
        assert not list(workspace.glob("*.onnx*"))

        programs: list[Program] = []

        def compile_engine(compiler, target, graph, shapes, folder, timings, program: Program) -> EngineResult:
            programs.append(program)
            return fake_engine(compiler, target, graph, shapes, folder, timings)

        compiler = SimpleNamespace(package="tensorrt-rtx", version="1.7.1")
        monkeypatch.setattr(build_module, "find_compiler", lambda _target, _requested: compiler)
        monkeypatch.setattr(targets, "installed_version", lambda _package: "2.13.0")
        monkeypatch.setattr(build_module, "compile_engine", compile_engine)
        assert main(["--resume", str(workspace)]) == 0
        assert set(stages(capsys.readouterr().err)) == {"compile", "write", "done"}
        assert [program.output_names[0] for program in programs] == ["caption_tokens", "next_x"]
        assert programs[1].module.decoder.dtype == torch.bfloat16
        bundle = open_bundle(tmp_path / "out")
        assert bundle.manifest.runtime.package == "tensorrt-rtx"
        report = json.loads(bundle.file("report.json").read_text())
        assert report["compiler"] == "torch-tensorrt-rtx 2.13.0 and tensorrt-rtx 1.7.1"
        assert "not exported" in bundle.file("report.html").read_text()

    def test_a_full_disk_leaves_no_partial_bundle(
        self, build_tiny: Build, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        def fail(_source: Path, _path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", fail)
            patch.setattr(shutil, "copyfile", fail)
            assert build_tiny("cpu") == 2
        assert "the disk is full. To continue the build:" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["out.build"]
        assert main(["--resume", str(tmp_path / "out.build")]) == 0
        assert open_bundle(tmp_path / "out").manifest.decoder == "tiny"

    def test_resume_rejects_other_options(self, tmp_path: Path, capsys):
        with pytest.raises(SystemExit):
            main(["--resume", str(tmp_path), "--precision", "fp8"])
        assert "--resume uses the options of the interrupted build; omit --precision" in capsys.readouterr().err
        assert main(["--resume", str(tmp_path)]) == 2
        assert "is not an interrupted build" in capsys.readouterr().err


class TestBuild:
    @pytest.mark.slow
    def test_the_bundled_decoder_becomes_fp8_engines_for_the_rtx_5090(self, tmp_path: Path, capsys):
        """A complete build on the command line; TensorRT for RTX needs no GPU."""
        output, latents = tmp_path / "demo", tmp_path / "latents"
        latents.mkdir()
        save_file({"latent": photo_calibration().samples[0].latent}, latents / "one.safetensors")
        options = ["--target", "rtx5090", "--precision", "fp8", "--max-batch", "2", "--keep-onnx"]
        options += ["--sizes", "128x128,96x128", "--calibration", str(latents)]
        assert main(["--decoder", "dct-demo", *options, "--output", str(output)]) == 0
        manifest = open_bundle(output).manifest
        assert manifest.runtime.package == "tensorrt-rtx"
        assert manifest.runtime.compute_capability == (12, 0)
        assert {engine.graph for engine in manifest.engines} == {"condition", "step"}
        assert {"step.onnx", "step.onnx.data", "step.engine"} <= set(manifest.files)
        assert "weights.safetensors" not in manifest.files
        assert any("The engines have not been run yet" in warning for warning in manifest.warnings)
        report = json.loads((output / "report.json").read_text())
        for found in (*report["checks"], *report["network"]["quantisation"]["kinds"]):
            assert max(found["velocity_error"]) <= found["tolerance"]
        assert manifest.quantisation is not None
        assert manifest.quantisation.attention == ("patch", "pixel")
        condition, step = report["engines"]
        assert condition["attentions"] == []
        assert [attention["kernels"] for attention in step["attentions"]] == [["Ada_qmma_e4m3_fp32"] * 2] * 3
        html = (output / "report.html").read_text()
        assert "<td>patch blocks</td><td>FP8</td><td>Ada_qmma_e4m3_fp32</td><td>4</td>" in html
        assert "<td>pixel blocks</td><td>FP8</td><td>Ada_qmma_e4m3_fp32</td><td>2</td>" in html
        assert {path.name for path in tmp_path.iterdir()} == {"demo", "latents"}
        assert "engine      step, " in capsys.readouterr().out

    def test_too_little_disk_space_is_reported_before_any_work(
        self, build_tiny: Build, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
        assert build_tiny("cpu") == 2
        assert "Not enough disk space" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_missing_package_is_named(self, workspace: Path, capsys, monkeypatch: pytest.MonkeyPatch):
        def not_installed(package: str) -> None:
            raise ConfigError(f"{package} is not installed: pip install {package}.")

        monkeypatch.setattr(trt, "import_package", not_installed)
        assert main(["--resume", str(workspace)]) == 2
        assert "tensorrt-rtx is not installed: pip install tensorrt-rtx" in capsys.readouterr().err

    def test_a_dry_run_only_prints_the_plan(self, tmp_path: Path, capsys):
        options = ["--decoder", "flux-2k", "--random-weights", "--precision", "fp8", "--sizes", "2048x2048,1536x2688"]
        assert main([*options, "--target", "h200", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
        plan = capsys.readouterr().out
        assert "1,362 M parameters to 939 M" in plan
        assert "both engines with tensorrt, for 2048x2048, 1536x2688" in plan
        assert "a machine with an H200" in plan
        assert "warning: The FP8 scales were calibrated with synthetic latents" in plan
        assert not list(tmp_path.iterdir())

    def test_images_below_the_minimum_psnr_are_rejected_unless_forced(self, tmp_path: Path, capsys):
        latents, output = tmp_path / "latents", tmp_path / "out"
        latents.mkdir()
        save_file({"latent": torch.randn(16, 4, 4)}, latents / "one.safetensors")
        options = ["--decoder", "dct-demo", "--target", "cpu", "--precision", "fp8", "--sizes", "64x64"]
        options += ["--calibration", str(latents), "--min-psnr", "200", "--output", str(output)]
        assert main(options) == 2
        stderr = capsys.readouterr().err
        assert "Even with only one layer, the calibration images have a PSNR of " in stderr
        assert "dB relative to those without quantisation, below --min-psnr 200. " in stderr
        assert [path.name for path in tmp_path.iterdir()] == ["latents"]
        assert main([*options, "--force"]) == 0
        manifest = open_bundle(output).manifest
        assert any("Built with --force" in warning for warning in manifest.warnings)
        assert manifest.quantisation is not None
        assert manifest.quantisation.layers == 1  # it does not change the choice


class TestWorkspaceFiles:
    @pytest.mark.parametrize("name", ["condition.onnx", "step.onnx.data"])
    def test_a_graph_of_another_build_is_not_compiled(self, workspace: Path, name: str, capsys):
        alter(workspace / name)
        assert main(["--resume", str(workspace)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{workspace / name} was modified or damaged; copy it again, or start a new build." in error
        (workspace / name).unlink()
        assert main(["--resume", str(workspace)]) == 2
        assert f"The workspace {workspace} has no file {name}; copy it again" in capsys.readouterr().err

    def test_an_engine_of_another_build_is_not_written(
        self, workspace: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(build_module, "compile_engine", fake_engine)
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "write_html", fail)
            assert main(["--resume", str(workspace)]) == 2
        assert "report.html could not be written: Input/output error." in capsys.readouterr().err
        alter(workspace / "step.engine")
        assert main(["--resume", str(workspace)]) == 2
        assert "step.engine was modified or damaged" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_engines_are_verified_only_against_the_weights_of_their_build(
        self, workspace: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        """The verification on the GPU compares the engines with the weights in the workspace."""
        compared: list[bytes] = []

        def verify(bundle, _progress) -> DeviceResult:
            compared.append(bundle.file("weights.safetensors").read_bytes())
            errors, numbers = {"64x64": (0.0,)}, {"64x64": 90.0}
            return DeviceResult(
                device="GPU",
                velocity_error=errors,
                image_psnr=numbers,
                milliseconds=numbers,
                peak_bytes=1,
                fused_attention=True,
            )

        monkeypatch.setattr(targets, "default_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
        monkeypatch.setattr(build_module, "compile_engine", fake_engine)
        monkeypatch.setattr(build_module, "verify_engines", verify)
        weights = workspace / "weights.safetensors"
        content = weights.read_bytes()
        alter(weights)
        assert main(["--resume", str(workspace)]) == 2
        assert f"{weights} was modified or damaged" in capsys.readouterr().err
        assert compared == []
        weights.write_bytes(content)
        assert main(["--resume", str(workspace)]) == 0
        assert compared == [content]

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"format": 1}', "[" * 100_000, '{"format": 2, "times": [0.999]}', "\x00"]
    )
    def test_a_damaged_state_is_one_sentence(self, workspace: Path, content: str, capsys):
        (workspace / "build.json").write_text(content)
        assert main(["--resume", str(workspace)]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_a_workspace_that_is_a_link_is_not_deleted(self, build_tiny: Build, tmp_path: Path, capsys):
        photos = tmp_path / "photos"
        photos.mkdir()
        (tmp_path / "out.build").symlink_to(photos)
        assert build_tiny("cpu", "--overwrite") == 2
        assert "contains something other than a build and will not be overwritten" in capsys.readouterr().err
        (tmp_path / "out.build").unlink()
        (tmp_path / "out.build").touch()
        assert build_tiny("cpu", "--overwrite") == 2
        assert photos.is_dir()


def alter(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
