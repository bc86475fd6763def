"""Counted work and predicted times."""

from pathlib import Path

import pytest

from engines.benchmark.predictions import GPUS, SIZES, decoder_work, find_gpu, page, predict
from engines.benchmark.roofline import count_flops
from engines.benchmark.work import count_work
from engines.pid import released
from engines.size import Size

PAGE = Path(__file__).parents[3] / "docs" / "measurements" / "predictions.md"
SIZE = Size(1024, 1024)


def test_the_page_is_what_the_code_prints():
    """If the network changes, run: python -m engines.benchmark.predictions > docs/measurements/predictions.md."""
    assert PAGE.read_text() == page()


def test_the_products_are_all_operations_of_the_network():
    config = released("flux-2kto4k-v1.5").config
    flops = count_flops(config, SIZE, config.caption_tokens, 1)
    for precision in ("bf16", "fp8"):
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


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_prediction_exceeds_the_published_rates(gpu):
    for size in SIZES:
        flops = sum(product.flops for product in decoder_work(size, "bf16").step)
        assert predict(gpu, size, "bf16").step > flops / gpu.bf16
        assert predict(gpu, size, "fp8").step < predict(gpu, size, "bf16").step


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
