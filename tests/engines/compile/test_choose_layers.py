"""Precisions of the layers: the mixtures to choose from, the choice by the images, and builds that choose."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from build_engines import main
from engines.bundle import load_folded, open_bundle
from engines.compile.choose_layers import (
    Assignment,
    LayerErrors,
    choose_mixture,
    describe_layers,
    mixtures,
    share_in_fp4,
)
from engines.compile.planning.options import BuildOptions
from engines.compile.planning.plan import make_plan
from engines.errors import ConfigError
from engines.pid.fp4 import Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.quantised import quantised_layers
from tests.conftest import BuildOnce
from tests.engines.compile.conftest import Build

LAYERS = {
    "good": LayerErrors(400, fp8=0.001, fp4=0.01),
    "bad": LayerErrors(100, fp8=0.003, fp4=0.04),
    "fair": LayerErrors(300, fp8=0.002, fp4=0.02),
    "odd": LayerErrors(200, fp8=0.004),  # cannot be in FP4
}


def texts(found: Iterable[Assignment]) -> list[str]:
    return [" ".join(mixture[name] for name in LAYERS) for mixture in found]


def test_layers_move_to_the_next_precision_with_the_largest_error_first():
    assert texts(mixtures(LAYERS)) == [
        "fp4 fp4 fp4 fp8",
        "fp4 fp8 fp4 fp8",
        "fp4 fp8 fp8 fp8",
        "fp8 fp8 fp8 fp8",
        "fp8 fp8 fp8 16bit",
        "fp8 16bit fp8 16bit",
        "fp8 16bit 16bit 16bit",
    ]


def test_without_fp4_all_layers_begin_in_fp8():
    fp8 = {name: LayerErrors(errors.parameters, errors.fp8) for name, errors in LAYERS.items()}
    assert texts(mixtures(fp8)) == texts(mixtures(LAYERS))[3:]


@pytest.mark.parametrize(
    ("share", "first", "expected"),
    [(1.0, "fp4 fp4 fp4 fp8", 0.8), (0.7, "fp4 fp8 fp4 fp8", 0.7), (0.0, "fp8 fp8 fp8 fp8", 0)],
)
def test_the_share_of_weights_in_fp4_is_limited(share: float, first: str, expected: float):
    found = mixtures(LAYERS, share)
    assert texts(found)[0] == first
    assert share_in_fp4(found[0], LAYERS) == pytest.approx(expected)


@pytest.mark.parametrize("reached", range(8))
def test_the_smallest_mixture_that_reaches_the_minimum_is_chosen(reached: int):
    """The PSNR rises from mixture to mixture; number `reached` is the first that suffices, or none if it is 7."""
    candidates = mixtures(LAYERS)
    measured: list[Assignment] = []

    def psnr(mixture: Assignment) -> float:
        measured.append(mixture)
        return 35.0 + candidates.index(mixture) - reached

    assert choose_mixture(candidates, 35.0, psnr) == candidates[min(reached, 6)]
    assert len(measured) == len({str(mixture) for mixture in measured}) <= 5
    assert measured[0] == candidates[0]
    if reached == 0:
        assert len(measured) == 1


@pytest.mark.parametrize(
    ("counts", "text"),
    [((3, 0), "3 layers in FP4"), ((3, 2), "3 layers in FP4 and 2 layers in FP8"), ((0, 1), "1 layer in FP8")],
)
def test_a_mixture_is_described(counts: tuple[int, int], text: str):
    assert describe_layers(*counts) == text


class TestPlan:
    def test_fp4_needs_tensor_cores_that_multiply_it(self, tmp_path: Path):
        options = BuildOptions("dct-demo", "h200", tmp_path / "out", precision="fp4")
        message = r"h200 does not support fp4; choose one of bf16, fp8\. Its tensor cores do not multiply FP4; those of"
        with pytest.raises(ConfigError, match=message):
            make_plan(options)
        for target in ("cpu", "cuda", "rtx5090", "gb200"):
            assert make_plan(BuildOptions("dct-demo", target, tmp_path / "out", precision="fp4")).quantised == "fp4"

    @pytest.mark.parametrize(
        ("target", "compiler", "warns"),
        [("gb200", None, True), ("rtx5090", "tensorrt", True), ("rtx5090", None, False), ("cpu", None, False)],
    )
    def test_a_compiler_that_has_not_been_tried_with_fp4_is_a_warning(
        self, target: str, compiler: Any, warns: bool, tmp_path: Path
    ):
        options = BuildOptions("dct-demo", target, tmp_path / "out", precision="fp4", compiler=compiler)
        assert any("FP4 has never been compiled" in warning for warning in make_plan(options).warnings) == warns

    @pytest.mark.parametrize(
        ("precision", "share", "message"),
        [
            ("fp8", 0.5, "--fp4-share does not apply to --precision fp8, only to fp4"),
            ("fp8", 0.0, "--fp4-share does not apply to --precision fp8, only to fp4"),
            ("fp4", 1.5, "--fp4-share 1.5 is not a share from 0 to 1"),
            ("fp4", float("nan"), "--fp4-share nan is not a share from 0 to 1"),
        ],
    )
    def test_an_invalid_share_is_rejected(self, precision: str, share: float, message: str, tmp_path: Path):
        options = BuildOptions("dct-demo", "cpu", tmp_path / "out", precision=precision, fp4_share=share)
        with pytest.raises(ConfigError, match=message):
            make_plan(options)


def test_random_weights_are_all_in_fp4_up_to_the_share(build_tiny: Build, tmp_path: Path):
    assert build_tiny("cpu", "--precision", "fp4", "--fp4-share", "0.5") == 0
    quantisation = open_bundle(tmp_path / "out").manifest.quantisation
    assert quantisation is not None
    assert 0.3 < quantisation.fp4_share <= 0.5
    network = load_folded(open_bundle(tmp_path / "out"))
    assert len(quantised_layers(network, Fp4Linear)) == quantisation.fp4_layers
    assert len(quantised_layers(network, Fp8Linear)) == quantisation.layers - quantisation.fp4_layers > 0


@pytest.fixture(scope="session")
def mixed_bundle(build_once: BuildOnce) -> Path:
    """The bundled decoder with as many layers in FP4 as a high minimum PSNR allows."""

    def build(directory: Path) -> None:
        arguments = ["--decoder", "dct-demo", "--target", "cpu", "--precision", "fp4", "--sizes", "256x256"]
        assert main([*arguments, "--min-psnr", "75", "--output", str(directory / "bundle")]) == 0

    return build_once("mixed-bundle", build) / "bundle"


def test_the_images_decide_how_many_layers_are_in_fp4(mixed_bundle: Path):
    bundle = open_bundle(mixed_bundle)
    quantisation = bundle.manifest.quantisation
    assert quantisation is not None
    assert quantisation.image_psnr >= 75
    assert 0 < quantisation.fp4_layers < quantisation.layers == 19
    report = json.loads((mixed_bundle / "report.json").read_text())["network"]["quantisation"]
    tried = {mixture["fp4_layers"]: mixture["image_psnr"] for mixture in report["mixtures"]}
    (chosen,) = [mixture for mixture in report["mixtures"] if mixture["chosen"]]
    assert chosen["fp4_layers"] == quantisation.fp4_layers
    assert chosen["image_psnr"] == pytest.approx(quantisation.image_psnr)
    assert tried[quantisation.fp4_layers + 1] < 75  # one more would be too many
    layers = {layer["name"]: layer for layer in report["layers"]}
    in_fp4 = [layer for layer in layers.values() if layer["precision"] == "fp4"]
    in_fp8 = [layer for layer in layers.values() if layer["precision"] == "fp8"]
    assert min(layer["fp4_error"] for layer in in_fp8) >= max(layer["fp4_error"] for layer in in_fp4)
    assert {name for name, layer in layers.items() if layer["precision"] == "fp4"} == set(
        quantised_layers(load_folded(bundle), Fp4Linear)
    )


def test_the_report_shows_all_three_precisions(mixed_bundle: Path):
    html = (mixed_bundle / "report.html").read_text()
    for heading in ("layers and attentions in FP4", "layers and attentions in FP8", "layers and attentions in 16 bit"):
        assert heading in html
    assert html.count("<title>pixel_blocks.0.modulation_in: ") == 1  # a point of the plot
    assert "moved here for --min-psnr or --fp4-share" in html


def test_without_fp4_too_the_worst_layers_stay_in_16_bit(tmp_path: Path):
    latents, output = tmp_path / "latents", tmp_path / "out"
    latents.mkdir()
    save_file(
        {"latent": torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0))}, latents / "one.safetensors"
    )
    options = ["--decoder", "dct-demo", "--target", "cpu", "--precision", "fp8", "--sizes", "64x64"]
    assert main([*options, "--calibration", str(latents), "--min-psnr", "85", "--output", str(output)]) == 0
    quantisation = open_bundle(output).manifest.quantisation
    assert quantisation is not None
    assert 0 < quantisation.layers < 19
    assert quantisation.image_psnr >= 85
