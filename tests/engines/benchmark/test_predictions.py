"""Counted work and predicted times."""

from dataclasses import replace
from pathlib import Path

import pytest

from engines.benchmark.predictions import (
    GPUS,
    POINTWISE_SHARE,
    PRECISIONS,
    SIZES,
    decoder_work,
    find_gpu,
    page,
    pointwise_bytes,
    predict,
    quantisation_bytes,
)
from engines.benchmark.roofline import count_flops
from engines.benchmark.work import count_work
from engines.pid import released
from engines.size import Size

PAGE = Path(__file__).parents[3] / "docs" / "measurements" / "predictions.md"
SIZE = Size(1024, 1024)
BREAK_EVEN = {"RTX 5090": 0.26, "GB200": 0.29}  # fractions of the peak rate in FP4, as the page has them
EVERY_GPU = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
WITH_FP4 = pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.fp4], ids=lambda gpu: gpu.name)


def test_the_page_is_what_the_code_prints():
    """If the network changes, run: python -m engines.benchmark.predictions > docs/measurements/predictions.md."""
    assert PAGE.read_text() == page()


def test_the_products_are_all_operations_of_the_network():
    config = released("flux-2kto4k-v1.5").config
    flops = count_flops(config, SIZE, config.caption_tokens, 1)
    for precision in PRECISIONS:
        work = count_work(config, SIZE, precision)
        assert sum(product.flops for product in work.step) == pytest.approx(flops.step, rel=0.01)
        assert sum(product.flops for product in work.condition) == pytest.approx(flops.condition, rel=0.01)


def test_fp8_halves_the_weights_of_most_layers_and_moves_fewer_bytes():
    config = released("flux-2kto4k-v1.5").config
    bf16, fp8 = (count_work(config, SIZE, precision).step for precision in ("bf16", "fp8"))
    assert {product.kind for product in bf16} == {"linear", "joint attention", "pixel attention"}
    assert {product.kind for product in fp8} == {"linear", "FP8 linear", "joint attention", "pixel attention"}
    assert sum(p.weight_bytes for p in fp8) < 0.6 * sum(p.weight_bytes for p in bf16)
    assert sum(p.activation_bytes for p in fp8) < sum(p.activation_bytes for p in bf16)


def test_fp4_stores_inputs_and_weights_in_4_5_bits_and_quantises_what_fp8_does():
    fp8, fp4 = (decoder_work(SIZE, precision).step for precision in ("fp8", "fp4"))
    assert {product.kind for product in fp4} == {"linear", "FP4 linear", "joint attention", "pixel attention"}
    for before, product in zip(fp8, fp4, strict=True):
        if before.kind != "FP8 linear":
            assert product == before
            continue
        assert (product.kind, product.flops) == ("FP4 linear", before.flops)
        assert product.weight_bytes == before.weight_bytes * 4.5 / 8
        assert before.activation_bytes - product.activation_bytes == product.fp4_inputs * 3.5 / 8


def test_kernels_that_quantise_to_fp4_read_16_bits_and_write_4_5_in_addition_to_the_kernels_of_bf16():
    bf16, fp4 = (decoder_work(SIZE, precision).step for precision in ("bf16", "fp4"))
    quantising = quantisation_bytes(fp4)
    assert quantising == sum(product.fp4_inputs for product in fp4) * (16 + 4.5) / 8
    assert pointwise_bytes(fp4, "fp4") - quantising == pytest.approx(pointwise_bytes(bf16, "bf16"))
    assert pointwise_bytes(bf16, "bf16") == POINTWISE_SHARE["bf16"] * sum(p.activation_bytes for p in bf16)


@EVERY_GPU
def test_no_prediction_exceeds_the_published_rates(gpu):
    for size in SIZES:
        flops = sum(product.flops for product in decoder_work(size, "bf16").step)
        assert predict(gpu, size, "bf16").step > flops / gpu.bf16
        assert predict(gpu, size, "fp8").step < predict(gpu, size, "bf16").step


@EVERY_GPU
def test_fp4_is_predicted_where_the_tensor_cores_have_it(gpu):
    assert gpu.precisions == (("bf16", "fp8", "fp4") if gpu.name in ("RTX 5090", "GB200") else ("bf16", "fp8"))
    if "fp4" not in gpu.precisions:
        with pytest.raises(ValueError, match=f"no predictions for fp4 on {gpu.name}"):
            predict(gpu, SIZE, "fp4")


@WITH_FP4
def test_fp4_is_faster_than_fp8_from_the_fraction_of_the_peak_rate_that_the_page_has(gpu):
    assert gpu.fp4_linear < gpu.fp8_linear
    fraction = BREAK_EVEN[gpu.name]
    assert f"{fraction:.0%}".replace("%", " %") in page().split("## What FP4 gains")[1]
    for size in SIZES:
        fp8 = predict(gpu, size, "fp8").step
        assert predict(gpu, size, "fp4").step < fp8
        assert predict(replace(gpu, fp4_linear=fraction + 0.01), size, "fp4").step < fp8
        assert predict(replace(gpu, fp4_linear=fraction - 0.01), size, "fp4").step > fp8


@WITH_FP4
def test_quantising_costs_the_share_of_the_gain_that_the_page_has(gpu):
    for size in SIZES:
        fp8, fp4 = (decoder_work(size, precision).step for precision in ("fp8", "fp4"))
        gain = sum(p.flops for p in fp8 if p.kind == "FP8 linear") / gpu.rate("FP8 linear")
        gain -= sum(p.flops for p in fp4 if p.kind == "FP4 linear") / gpu.rate("FP4 linear")
        cost = quantisation_bytes(fp4) / gpu.memory_rate
        assert 0.18 < cost / gain < 0.22 if gpu.name == "RTX 5090" else 0.5 < cost / gain < 1


def test_on_the_rtx_5090_fp4_gains_more_than_attention_in_fp8_only_for_small_images():
    gpu = find_gpu("NVIDIA GeForce RTX 5090")
    for size in SIZES:
        fp4, attention = predict(gpu, size, "fp4").step, predict(gpu.with_fp8_attention(), size, "fp8").step
        assert (fp4 < attention) == (size == SIZE)
        assert predict(gpu.with_fp8_attention(), size, "fp4").step < min(fp4, attention)


def test_attention_in_fp8_needs_the_time_of_its_rate_and_changes_nothing_else():
    gpu = find_gpu("NVIDIA GeForce RTX 5090")
    fp8 = gpu.with_fp8_attention()
    assert fp8.rate("joint attention") == pytest.approx(gpu.fp8 * gpu.fp8_attention)
    for kind in ("linear", "FP8 linear", "FP4 linear", "convolution"):
        assert fp8.rate(kind) == gpu.rate(kind)
    assert [gpu.name for gpu in GPUS if gpu.fp8_attention] == ["RTX 5090"]


@pytest.mark.parametrize(
    ("product_name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L4", None),
    ],
)
def test_gpus_are_found_by_their_product_names(product_name: str, gpu: str | None):
    found = find_gpu(product_name)
    assert (found.name if found else None) == gpu
