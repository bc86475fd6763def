"""FP8 attention: candidates by option and target, the decision by PSNR, and what a build records of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from build_engines import main
from engines.bundle import load_folded, open_bundle
from engines.compile.choose_attention import choose_attention
from engines.compile.planning.attention import AttentionKinds, attention_candidates, attention_warnings
from engines.compile.planning.options import AttentionOption, BuildOptions, Compiler
from engines.compile.planning.plan import make_plan
from engines.compile.planning.targets import TARGETS
from engines.compile.results import AttentionCandidate
from engines.errors import ConfigError
from engines.pid.blocks import attentions
from engines.size import Size
from tests.engines.compile.conftest import Build

BOTH, PATCH, PIXEL, NONE = ("patch", "pixel"), ("patch",), ("pixel",), ()
ALL = (BOTH, PATCH, PIXEL, NONE)
SIZES = (Size(2048, 2048), Size(256, 256))


@pytest.mark.parametrize(
    ("option", "target", "compiler", "expected"),
    [
        ("auto", "rtx5090", None, ALL),
        ("auto", "rtx5090", "tensorrt-rtx", ALL),
        ("auto", "rtx5090", "tensorrt", (NONE,)),
        ("auto", "rtx5090", "torch-tensorrt", ALL),
        ("auto", "h200", "torch-tensorrt", (NONE,)),
        ("auto", "gb200", None, (NONE,)),
        ("auto", "h200", None, (NONE,)),
        ("auto", "cuda", None, (NONE,)),
        ("auto", "cpu", None, ALL),
        ("fp8", "cuda", None, (BOTH,)),
        ("fp8", "h200", "tensorrt", (BOTH,)),
        ("fp8", "rtx5090", None, (BOTH,)),
        ("16bit", "rtx5090", None, (NONE,)),
        ("16bit", "cpu", None, (NONE,)),
    ],
)
def test_candidates(
    option: AttentionOption, target: str, compiler: Compiler | None, expected: tuple[AttentionKinds, ...]
):
    assert attention_candidates(option, TARGETS[target], compiler, SIZES, random_weights=False) == expected


def test_random_weights_need_no_decision():
    assert attention_candidates("auto", TARGETS["rtx5090"], None, SIZES, random_weights=True) == (BOTH,)
    assert attention_candidates("auto", TARGETS["cuda"], None, SIZES, random_weights=True) == (NONE,)


def test_sizes_without_an_fp8_kernel():
    target, sizes = TARGETS["rtx5090"], (*SIZES, Size(80, 96))  # 30 tokens
    assert attention_candidates("auto", target, None, sizes, random_weights=False) == (NONE,)
    with pytest.raises(ConfigError, match=r"no FP8 attention kernel for images as small as 80x96: .* 8,192 pixels"):
        attention_candidates("fp8", target, None, sizes, random_weights=False)
    assert attention_candidates("fp8", target, None, (Size(64, 128),), random_weights=False) == (BOTH,)
    assert attention_candidates("fp8", TARGETS["cpu"], None, sizes, random_weights=False) == (BOTH,)


@pytest.mark.parametrize(
    ("target", "compiler", "expected"),
    [
        ("cuda", None, None),
        ("gb200", None, "never been compiled with the full TensorRT"),
        ("rtx5090", "tensorrt", "never been compiled with the full TensorRT"),
        ("h200", "torch-tensorrt", "never been compiled with the full TensorRT"),
        ("rtx5090", "torch-tensorrt", None),
        ("rtx5090", None, None),
        ("cpu", None, None),
    ],
)
def test_warnings(target: str, compiler: Compiler | None, expected: str | None):
    found = attention_warnings((BOTH,), TARGETS[target], compiler)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
    assert attention_warnings((NONE,), TARGETS[target], compiler) == []


def test_the_option_applies_only_to_quantised_networks(tmp_path: Path):
    options = BuildOptions("dct-demo", "cpu", tmp_path / "out", precision="bf16", attention="16bit")
    with pytest.raises(ConfigError, match="--attention does not apply to --precision bf16, only to fp8, fp4"):
        make_plan(options)


def test_a_plan_has_the_candidates_and_warnings(tmp_path: Path):
    options = BuildOptions("dct-demo", "cuda", tmp_path / "out", precision="fp8", attention="fp8")
    plan = make_plan(options)
    assert plan.attention == (BOTH,)
    engines = BuildOptions("dct-demo", "gb200", tmp_path / "out", precision="fp8", attention="fp8")
    assert any("FP8 attention has never" in warning for warning in make_plan(engines).warnings)
    assert make_plan(BuildOptions("dct-demo", "cpu", tmp_path / "out", precision="fp8")).attention == ALL
    kept = BuildOptions("dct-demo", "cuda", tmp_path / "out", precision="fp8", keep=("patch_blocks.*.attn",))
    with pytest.raises(ConfigError, match="matches no layer that would be quantised"):
        make_plan(kept)


@pytest.mark.parametrize(
    ("psnr", "tried", "chosen"),
    [
        ({BOTH: 35.0, PATCH: 50.0, PIXEL: 60.0, NONE: 70.0}, 1, BOTH),
        ({BOTH: 34.9, PATCH: 36.0, PIXEL: 60.0, NONE: 70.0}, 2, PATCH),
        ({BOTH: 34.9, PATCH: 30.0, PIXEL: 36.0, NONE: 70.0}, 3, PIXEL),
        ({BOTH: 20.0, PATCH: 30.0, PIXEL: 31.0, NONE: 70.0}, 4, NONE),
        ({BOTH: 20.0, PATCH: 30.0, PIXEL: 31.0, NONE: 34.0}, 4, NONE),
        ({BOTH: float("nan"), PATCH: 40.0, PIXEL: 31.0, NONE: 34.0}, 2, PATCH),
    ],
)
def test_the_first_candidate_that_reaches_the_minimum_is_chosen(
    psnr: dict[AttentionKinds, float], tried: int, chosen: AttentionKinds
):
    def measure(kinds: AttentionKinds) -> AttentionCandidate:
        return AttentionCandidate(kinds=kinds, velocity_error=(0.1,), image_psnr=psnr[kinds])

    measured = choose_attention(ALL, 35.0, measure)
    assert [candidate.kinds for candidate in measured] == list(ALL[:tried])
    assert measured[-1].kinds == chosen


def test_a_bundle_with_fp8_attention_records_and_loads_it(build_tiny: Build, tmp_path: Path):
    """Random weights get FP8 attention unmeasured on the CPU; --keep excludes single attentions."""
    assert build_tiny("cpu", "--precision", "fp8", "--keep", "patch_blocks.1.attn") == 0
    bundle = open_bundle(tmp_path / "out")
    assert bundle.manifest.quantisation is not None
    assert bundle.manifest.quantisation.attention == BOTH
    in_fp8 = {name: attention.fp8 is not None for name, attention in attentions(load_folded(bundle)).items()}
    assert [name for name, fp8 in in_fp8.items() if not fp8] == ["patch_blocks.1.attn"]
    quantisation = json.loads((tmp_path / "out" / "report.json").read_text())["network"]["quantisation"]
    found = {attention["name"]: attention for attention in quantisation["attentions"]}
    assert {name: attention["precision"] == "fp8" for name, attention in found.items()} == in_fp8
    assert {name: attention["fp8_error"] is not None for name, attention in found.items()} == in_fp8
    assert [candidate["kinds"] for candidate in quantisation["candidates"]] == [["patch", "pixel"]]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "kept by --keep patch_blocks.1.attn" in html
    assert "pixel_blocks.0.attn" in html


def test_the_attention_stays_in_16_bit_on_request(build_tiny: Build, tmp_path: Path):
    assert build_tiny("cpu", "--precision", "fp8", "--attention", "16bit") == 0
    bundle = open_bundle(tmp_path / "out")
    assert bundle.manifest.quantisation is not None
    assert bundle.manifest.quantisation.attention == ()
    assert all(attention.fp8 is None for attention in attentions(load_folded(bundle)).values())


def test_the_images_decide_for_trained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """No candidate reaches a minimum of 98 dB, so all are tried, and the last is measured without FP8 attention."""
    output = tmp_path / "out"
    latents = tmp_path / "latents"
    latents.mkdir()
    save_file({"latent": torch.randn(16, 4, 4)}, latents / "one.safetensors")
    options = ["--decoder", "dct-demo", "--target", "cpu", "--precision", "fp8", "--sizes", "64x64", "--force"]
    assert main([*options, "--calibration", str(latents), "--min-psnr", "98", "--output", str(output)]) == 0
    quantisation = open_bundle(output).manifest.quantisation
    assert quantisation is not None
    assert quantisation.attention == ()
    report = json.loads((output / "report.json").read_text())["network"]["quantisation"]
    assert [tuple(candidate["kinds"]) for candidate in report["candidates"]] == list(ALL)
    assert len({tuple(candidate["velocity_error"]) for candidate in report["candidates"]}) == len(ALL)
    assert report["mixtures"][0]["image_psnr"] == pytest.approx(report["candidates"][-1]["image_psnr"])
    assert {attention["reason"] for attention in report["attentions"]} == {
        "in FP8, the calibration images are below --min-psnr"
    }
    assert "16 bit" in capsys.readouterr().err
