"""FP4 products of real engines for the RTX 5090, and builds whose engines lack them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from build_engines import main
from engines.bundle import load_folded, open_bundle
from engines.compile.compile_engine import EngineShapes, compile_engine
from engines.compile.describe_bundle import add_engine_warnings
from engines.compile.export import export
from engines.compile.fp4_products import (
    ProductError,
    ProductRecord,
    RequestedProduct,
    check_fp4_products,
    find_fp4_products,
    read_fp4_products,
)
from engines.compile.planning.targets import TARGETS, find_compiler
from engines.compile.results import EngineResult
from engines.compile.variants import QuantisedLayers, cast
from engines.pid.fp4 import Fp4Linear
from engines.pid.quantised import quantised_layers
from engines.runtime.trt import import_package
from engines.size import Size
from engines.size_profiles import size_profiles
from tests.engines.compile.networks import calibrated, network_of
from tests.tiny import TINY, manifest

PRODUCTS = (RequestedProduct("patch_blocks.0.attn.qkv_x", 3456), RequestedProduct("pixel_blocks.0.modulation_in", 512))
RECORDS = [ProductRecord((product.name,), product.nbytes) for product in PRODUCTS] * 2  # of two profiles


def test_the_products_of_an_engine_read_weights_of_four_bits(tmp_path: Path):
    """Every second layer in FP4, the others in FP8; two optimisation profiles; pixel blocks in several chunks."""
    config = replace(TINY, patch_depth=1, pixel_depth=2)
    network = network_of(config)
    layers = QuantisedLayers(network, calibrated(network).inputs)
    names = list(layers.largest_inputs)
    mixture = {name: "fp8" if index % 2 else "fp4" for index, name in enumerate(names)}
    mixture |= dict.fromkeys(("pixel_blocks.0.modulation_in", "pixel_blocks.1.modulation_in"), "fp4")
    quantised = layers.network(mixture)
    cast(quantised, torch.bfloat16)
    quantised.pixel_memory_budget = 1
    sizes = (Size(256, 256), Size(128, 512))
    export(quantised, "step", sizes[0], 4, 1, tmp_path)
    target = TARGETS["rtx5090"]
    shapes = EngineShapes(config, 4, size_profiles(sizes, None), 1)
    engine = compile_engine(
        find_compiler(target, "tensorrt-rtx"), target, "step", shapes, tmp_path, tmp_path / "timings"
    )
    in_fp4 = quantised_layers(quantised, Fp4Linear)
    assert {product.name.split()[0]: product.bytes for product in engine.fp4_products} == {
        name: layer.weight.nbytes for name, layer in in_fp4.items()
    }
    chunks = [product.name for product in engine.fp4_products if product.name.startswith("pixel_blocks.0.modulation")]
    assert chunks[:2] == ["pixel_blocks.0.modulation_in", "pixel_blocks.0.modulation_in 2"]
    assert all(product.recognised for product in engine.fp4_products)
    records = read_fp4_products(tmp_path / "step.engine")
    names = [name for record in records for name in record.names]
    assert sorted(names) == sorted(2 * [product.name for product in engine.fp4_products])
    assert len(names) > len(records)  # TensorRT computes layers with the same input together


def test_layers_in_fp8_are_no_fp4_products(tmp_path: Path):
    network = network_of(replace(TINY, patch_depth=1))
    layers = QuantisedLayers(network, calibrated(network).inputs)
    export(layers.network(dict.fromkeys(layers.largest_inputs, "fp8")), "step", Size(64, 64), 4, 1, tmp_path, True)
    package = import_package("tensorrt-rtx")
    definition = package.module.Builder(package.logger).create_network(0)
    assert package.module.OnnxParser(definition, package.logger).parse_from_file(str(tmp_path / "step.onnx"))
    assert find_fp4_products(package.module, definition) == ()


def test_an_fp4_weight_that_belongs_to_no_product_is_an_error():
    """TensorRT's parser may represent a layer in a way that this version does not know."""
    package = import_package("tensorrt-rtx")
    network = package.module.Builder(package.logger).create_network(0)
    packed = np.zeros((16, 16), np.uint8)
    weights = package.module.Weights(package.module.DataType.FP4, packed.ctypes.data, 2 * packed.size)
    network.add_constant((16, 32), weights)
    with pytest.raises(ProductError, match="belongs to no matrix product"):
        find_fp4_products(package.module, network)


def test_all_products_are_recognised():
    results = check_fp4_products(PRODUCTS, RECORDS, 2, "tensorrt-rtx")
    assert [(result.name, result.bytes, result.recognised) for result in results] == [
        (product.name, product.nbytes, True) for product in PRODUCTS
    ]


def test_products_with_the_same_input_may_be_computed_together():
    together = ProductRecord(tuple(product.name for product in PRODUCTS), 3456 + 512)
    results = check_fp4_products(PRODUCTS, [together] * 2, 2, "tensorrt-rtx")
    assert [result.bytes for result in results] == [3456, 512]
    with pytest.raises(ProductError, match=r"compiled 1 of 2 in FP4"):
        check_fp4_products(PRODUCTS, [together, ProductRecord(together.names, 3456 + 1024)], 2, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("records", "name", "count"),
    [
        ([], PRODUCTS[0].name, 0),
        (RECORDS[::2], PRODUCTS[1].name, 0),
        (RECORDS[:3], PRODUCTS[1].name, 1),
        ([*RECORDS[:3], ProductRecord((PRODUCTS[1].name,), 1024)], PRODUCTS[1].name, 1),
        ([*RECORDS, RECORDS[0]], PRODUCTS[0].name, 3),
    ],
)
def test_a_product_that_is_not_in_fp4_in_every_profile_is_an_error(records: list[ProductRecord], name: str, count: int):
    with pytest.raises(ProductError, match=rf"The product {name}, whose .* compiled {count} of 2 in FP4"):
        check_fp4_products(PRODUCTS, records, 2, "tensorrt-rtx")


def test_an_unknown_package_is_a_warning_in_the_manifest():
    results = check_fp4_products(PRODUCTS, [], 2, "tensorrt")
    assert not any(result.recognised for result in results)
    engine = EngineResult(graph="step", bytes=1, seconds=1.0, fp4_products=results)
    (warning,) = add_engine_warnings(manifest(), [engine]).warnings
    assert warning.startswith("2 FP4 products were not recognised in the engine")
    with pytest.raises(ProductError):
        check_fp4_products(PRODUCTS, RECORDS[:1], 2, "tensorrt")


@pytest.mark.slow
def test_a_checkpoint_becomes_engines_with_weights_of_four_bits(tmp_path: Path):
    """The whole builder, for the bundled decoder: calibration, choice of precisions, verification, engines, report."""
    output = tmp_path / "bundle"
    arguments = ["--decoder", "dct-demo", "--target", "rtx5090", "--precision", "fp4", "--sizes", "256x256"]
    assert main([*arguments, "--fp4-share", "0.9", "--output", str(output), "--keep-onnx"]) == 0
    bundle = open_bundle(output)
    quantisation = bundle.manifest.quantisation
    assert quantisation is not None
    assert quantisation.image_psnr >= 35
    assert 0.5 < quantisation.fp4_share <= 0.9
    report = json.loads((output / "report.json").read_text())
    layers = {layer["name"]: layer for layer in report["network"]["quantisation"]["layers"]}
    in_fp4 = {name: layer["parameters"] for name, layer in layers.items() if layer["precision"] == "fp4"}
    assert 0 < len(in_fp4) == quantisation.fp4_layers < quantisation.layers
    (step,) = [engine for engine in report["engines"] if engine["graph"] == "step"]
    products = {product["name"]: product["bytes"] for product in step["fp4_products"]}
    assert all(product["recognised"] for product in step["fp4_products"])
    assert set(products) == set(in_fp4)
    for name, size in products.items():
        assert 0 <= in_fp4[name] - 2 * size < 0.02 * in_fp4[name]  # the rest is the bias
    kinds = [check["what"] for check in report["network"]["quantisation"]["kinds"]]
    assert "patch_blocks.*.mlp_*.w2 in FP4" in kinds
    assert {check["what"] for check in report["checks"]} == {"float32", "float16"}
    html = (output / "report.html").read_text()
    assert "FP4 weights, without their scales" in html
    assert "not recognised" not in html
    with pytest.raises(Exception, match="weights"):
        load_folded(bundle)  # engines only
