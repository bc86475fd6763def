"""Options that cannot work are rejected before any work, with the limit or the path in the message."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engines.bundle import WEIGHTS, write_bundle
from engines.compile.planning import estimate, targets
from engines.compile.planning.options import BuildOptions
from engines.compile.planning.plan import make_plan
from engines.errors import ConfigError
from engines.size import Size
from engines.size_profiles import SizeRange
from tests.tiny import manifest


def options(tmp_path: Path, **changes: Any) -> BuildOptions:
    required = {"decoder": "dct-demo", "target": "cpu", "output": tmp_path / "out", "random_seed": 0}
    return BuildOptions(**{**required, **changes})


def message(tmp_path: Path, **changes: Any) -> str:
    """Plan a build, which must fail, and return the message, after checking that nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        make_plan(options(tmp_path, **changes))
    assert sorted(tmp_path.rglob("*")) == before
    text = str(caught.value)
    assert text.endswith(".")
    assert len(text) < 500
    return text


def test_released_stands_for_all_sizes_of_the_decoder(tmp_path: Path):
    plan = make_plan(options(tmp_path, decoder="flux-2k", sizes=(Size(1024, 1024), "released", Size(2048, 2048))))
    two_k = (Size(2048, 2048), Size(2304, 1728), Size(1728, 2304), Size(2688, 1536), Size(1536, 2688))
    assert plan.sizes == (Size(1024, 1024), *two_k)
    large = make_plan(options(tmp_path, decoder="flux-2kto4k-v1.5", sizes=("released",)))
    assert {Size(2048, 2048), Size(4096, 4096)} < set(large.sizes)


def test_a_range_of_sizes_is_the_last_profile(tmp_path: Path):
    size_range = SizeRange(smallest_side=1024, largest_side=4096)
    plan = make_plan(options(tmp_path, decoder="flux-2k", target="rtx5090", size_range=size_range))
    assert [str(profile) for profile in plan.profiles] == ["2048x2048", "1024x1024 to 4096x4096"]
    assert plan.largest_size == Size(4096, 4096)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "decoder": "flux-2k",
                "target": "rtx5090",
                "max_batch": 8,
                "size_range": SizeRange(smallest_side=1024, largest_side=8192),
            },
            "8192x8192 with --max-batch 8 needs at least",
        ),
        ({"sizes": (Size(1_000_000, 1_000_000),)}, "1000000x1000000 is not possible: sides may have at most 16,384"),
        ({"sizes": (Size(64, 16384 + 16),)}, "64x16400 is not possible: sides may have at most 16,384 pixels"),
        ({"sizes": (Size(0, 64),)}, "0x64 is not possible"),
        ({"sizes": (Size(64, 65),)}, "both sides must be multiples of 16"),
        (
            {"sizes": tuple(Size(64, 16 * i) for i in range(1, 66))},
            "65 sizes; a bundle may have at most 64",
        ),
        ({"max_batch": 10**6}, "--max-batch must be at least 1 and at most 256, got 1000000"),
        ({"max_batch": 257}, "at most 256, got 257"),
        ({"max_batch": -1}, "at least 1 and at most 256, got -1"),
        ({"random_seed": 2**64}, "--seed must be from -2^63 to 2^64 - 1"),
        ({"random_seed": -(2**63) - 1}, "--seed must be from -2^63 to 2^64 - 1"),
        ({"min_psnr": float("nan")}, "--min-psnr must be a finite number"),
        (
            {"decoder": "flux-2k", "target": "h200", "sizes": (Size(16384, 16384),), "max_batch": 16},
            "16384x16384 with --max-batch 16 needs at least 432 GiB of memory, more than the 141 GiB of the H200",
        ),
        (
            {"decoder": "flux-2k", "target": "cuda", "sizes": (Size(16384, 16384),), "max_batch": 256},
            "more than the 1,024 GiB of any device",
        ),
    ],
)
def test_absurd_numbers_are_rejected(changes: dict[str, Any], expected: str, tmp_path: Path):
    assert expected in message(tmp_path, **changes)


def test_the_largest_accepted_numbers_can_be_planned(tmp_path: Path):
    sizes = (Size(16384, 16), *(Size(64, 16 * i) for i in range(1, 64)))
    plan = make_plan(options(tmp_path, sizes=sizes, max_batch=256, random_seed=2**64 - 1))
    assert len(plan.sizes) == 64


def test_a_build_that_needs_more_memory_than_the_machine_has_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = make_plan(options(tmp_path))
    estimate.check_resources(plan)
    monkeypatch.setattr(os, "sysconf", lambda name: 1000 if name == "SC_PHYS_PAGES" else 4096)
    with pytest.raises(ConfigError, match=r"needs about 0.0 GB, but this machine has only 0.0 GB"):
        estimate.check_resources(plan)


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp8"), ("cpu", "fp16"), ("rtx5090", "fp8")])
def test_a_gpu_that_cuda_cannot_use_is_an_error_before_any_work(
    target: str, precision: str, unusable_gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise FP8 would be calibrated on the CPU, which takes hours, and engines would not be verified."""
    plan = make_plan(options(tmp_path, precision=precision, target=target))
    with pytest.raises(ConfigError, match=f"{unusable_gpu}To use the CPU instead, set CUDA_VISIBLE_DEVICES"):
        estimate.check_resources(plan)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    estimate.check_resources(plan)


class TestTorchTensorRT:
    """The compiler torch-tensorrt: what is checked before any work, and the stages."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with an H200."""
        monkeypatch.setattr(targets, "cuda_problem", lambda: None)
        monkeypatch.setattr(targets, "default_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(targets, "device_name", lambda _device: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
        monkeypatch.setattr(targets.trt, "import_package", lambda _package: None)

    def changes(self, target: str) -> dict[str, Any]:
        return {"decoder": "flux-2k", "target": target, "compiler": "torch-tensorrt"}

    @pytest.mark.parametrize("target", ["rtx5090", "h200"])
    def test_a_missing_package_is_an_error_on_a_machine_that_could_compile(
        self, target: str, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def missing(package: str) -> None:
            raise ConfigError(f"torch-{package} is not installed.")

        monkeypatch.setattr(targets, "installed_version", missing)
        package = {"rtx5090": "tensorrt-rtx", "h200": "tensorrt"}[target]
        assert message(tmp_path, **self.changes(target)) == f"torch-{package} is not installed."

    def test_another_machine_may_compile(self, gpu: None, tmp_path: Path):
        plan = make_plan(options(tmp_path, **self.changes("gb200")))
        stages = {stage.name: stage for stage in estimate.stages(plan)}
        assert "both engines with torch-tensorrt, for 2048x2048" in stages["compile"].task
        assert stages["compile"].machine == "a machine with a GB200"

    @pytest.mark.parametrize("keep_onnx", [False, True])
    def test_graphs_are_exported_to_onnx_only_for_the_bundle(self, keep_onnx: bool, tmp_path: Path):
        plan = make_plan(options(tmp_path, **self.changes("gb200"), keep_onnx=keep_onnx))
        assert plan.exports_onnx == keep_onnx
        assert ("export" in {stage.name for stage in estimate.stages(plan)}) == keep_onnx
        assert "check" in {stage.name for stage in estimate.stages(plan)}

    def test_it_applies_only_to_compiled_targets(self, tmp_path: Path):
        assert "--compiler applies only to compiled targets" in message(tmp_path, **self.changes("cuda"))


def test_the_output_may_not_be_inside_a_bundle_or_a_build(tmp_path: Path):
    caption = torch.ones(5, 24)
    files = {
        WEIGHTS: lambda path: save_file({"a": caption}, path),
        "caption.safetensors": lambda path: save_file({"caption": caption}, path),
    }
    bundle = write_bundle(tmp_path / "bundle", manifest(), files).path
    workspace = tmp_path / "other.build"
    workspace.mkdir()
    (workspace / "build.json").touch()
    for folder in (bundle, workspace):
        for path in (folder / "out", folder / "deep" / "out"):
            assert f"{path} is inside {folder}, a bundle or an interrupted build" in message(tmp_path, output=path)
    assert "may not end in .build" in message(tmp_path, output=tmp_path / "x.build")


def test_inputs_inside_the_output_are_not_deleted(tmp_path: Path):
    workspace = tmp_path / "out.build"
    for folder in (tmp_path / "out", workspace, tmp_path / "latents"):
        folder.mkdir()
        save_file({"caption": torch.ones(1, 16)}, folder / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(workspace / "a.safetensors")
    for name, changes in (
        ("--empty-caption", {"empty_caption": tmp_path / "out" / "a.safetensors"}),
        ("--empty-caption", {"empty_caption": tmp_path / "link.safetensors"}),
        ("--checkpoint", {"random_seed": None, "checkpoint": workspace / "a.safetensors"}),
        ("--calibration", {"precision": "fp8", "calibration": workspace}),
    ):
        text = message(tmp_path, overwrite=True, **changes)
        assert text.startswith(name)
        assert f"is inside --output {tmp_path / 'out'}, which is replaced" in text
    text = message(tmp_path, output=tmp_path / "latents" / "out", precision="fp8", calibration=tmp_path / "latents")
    assert f"is inside --calibration {tmp_path / 'latents'}" in text


def test_inputs_that_cannot_be_read_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("model.pth", "caption.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "latents").mkdir()
    inputs = {"random_seed": None, "precision": "fp8", "checkpoint": tmp_path / "model.pth"}
    inputs |= {"empty_caption": tmp_path / "caption.safetensors", "calibration": tmp_path / "latents"}
    for field in ("checkpoint", "empty_caption", "calibration"):
        monkeypatch.setattr(os, "access", lambda path, _mode, denied=inputs[field]: path != denied)
        assert f"{inputs[field]} cannot be read: Permission denied" in message(tmp_path, **inputs)


def test_the_empty_caption_is_needed_until_the_weights_are_complete(tmp_path: Path):
    """So that a build that an earlier version has begun with zeros can be resumed."""
    (tmp_path / "model.pth").touch()
    inputs = {"decoder": "flux-2k", "random_seed": None, "checkpoint": tmp_path / "model.pth"}
    assert "flux-2k needs --empty-caption FILE" in message(tmp_path, **inputs)
    make_plan(options(tmp_path, **inputs), weights_done=True)


def test_impossible_output_paths_are_errors(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "is not a possible path" in message(tmp_path, output=tmp_path / "loop")
    assert "too long; use at most 200 bytes" in message(tmp_path, output=tmp_path / ("x" * 201))


def test_the_output_of_a_plan_has_no_symbolic_links(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert make_plan(replace(options(tmp_path), output=tmp_path / "link")).options.output == tmp_path / "real"
