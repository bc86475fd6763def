"""FP8: which layers are quantised, their calibration, and the measured errors."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from build_engines import main
from engines.bundle import load_folded, open_bundle
from engines.compile import verify_fold
from engines.compile.build import _minimum_of_engines
from engines.compile.comparison import psnr
from engines.compile.inputs.calibrate import Ranges, calibrate, decode, load_calibration, synthetic_calibration
from engines.compile.planning.attention import BOTH
from engines.compile.planning.layer_rules import RULES, assign_rules, attention_names, linear_layers, rule_for
from engines.compile.planning.options import BuildOptions
from engines.compile.planning.plan import make_plan
from engines.compile.quantise import select_calibration
from engines.compile.sensitivity import measure_errors
from engines.compile.variants import (
    QuantisedLayers,
    TrialNetwork,
    set_fp8_attention,
    shallow_copy,
    with_quantised,
)
from engines.compile.verify_fold import VerificationError
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, released
from engines.pid.blocks import attentions
from engines.pid.fp8 import Fp8Linear
from engines.pid.fp8_attention import AttentionRange
from engines.pid.quantised import KINDS
from engines.pid.released import released_names
from engines.pid.sampler import MODEL_TIMESTEPS
from tests.conftest import BuildOnce
from tests.engines.compile.networks import ignore_progress, network_of
from tests.tiny import TINY


@pytest.fixture(scope="module")
def network() -> FoldedDecoder:
    return network_of(TINY)


@pytest.mark.parametrize("name", released_names())
def test_every_layer_matches_one_rule_and_every_rule_a_layer(name: str):
    config = released(name).config
    with torch.device("meta"):
        network = FoldedDecoder(config, MODEL_TIMESTEPS)
    layers = linear_layers(network) + attention_names(network, BOTH)
    for layer in layers:
        matching = [rule for rule in RULES if fnmatchcase(layer, rule.pattern)]
        # The gates of the adapter have a rule before that of the adapter.
        assert len(matching) == 1 + layer.startswith("lq_proj.gate"), layer
        assert rule_for(layer) == matching[0]
    unused = {rule.pattern for rule in RULES} - {rule_for(layer).pattern for layer in layers}
    assert unused <= {"pit_lq_gate.*"}


def test_most_weights_of_a_released_decoder_are_in_fp8():
    with torch.device("meta"):
        network = FoldedDecoder(released("flux-2k").config, MODEL_TIMESTEPS)
    in_fp8 = [layer for layer, rule in assign_rules(linear_layers(network), ()).items() if rule.quantised]
    weights = sum(network.get_parameter(f"{layer}.weight").numel() for layer in in_fp8)
    assert weights / sum(p.numel() for p in network.parameters()) > 0.85


def test_layers_matching_keep_are_not_quantised():
    layers = ("patch_blocks.0.mlp_x.w1", "patch_blocks.1.mlp_x.w1", "final_layer.linear")
    rules = assign_rules(layers, ["patch_blocks.1.*"])
    assert [rule.quantised for rule in rules.values()] == [True, False, False]
    assert "--keep patch_blocks.1.*" in rules[layers[1]].reason
    with pytest.raises(ConfigError, match=r"--keep final_layer\.\* matches no layer that would be quantised"):
        assign_rules(layers, ["final_layer.*"])


def test_keep_applies_to_attentions_too():
    names = ("patch_blocks.0.attn", "patch_blocks.0.attn.qkv_x", "patch_blocks.1.attn")
    assert [rule.quantised for rule in assign_rules(names, ["patch_blocks.*.attn"]).values()] == [False, True, False]
    assert [rule.quantised for rule in assign_rules(names, ["patch_blocks.0.*"]).values()] == [False, False, True]


def test_calibration_records_the_largest_input_over_all_steps(network: FoldedDecoder):
    calibration = synthetic_calibration(TINY)
    caption = torch.zeros(4, TINY.caption_width)
    layer = "patch_blocks.0.mlp_x.w2"
    inputs: list[float] = []
    handle = network.get_submodule(layer).register_forward_pre_hook(
        lambda _module, arguments: inputs.append(arguments[0].abs().max().item())
    )
    ranges, images = calibrate(network, calibration, caption, [layer], (), ignore_progress)
    handle.remove()
    assert len(inputs) == 4 * len(calibration.samples)
    assert ranges == Ranges({layer: max(inputs)}, {})
    assert [tuple(image.shape) for image in images] == [(3, 256, 256)] * len(calibration.samples)


def test_calibration_records_queries_keys_and_values_after_norm_and_rotation(network: FoldedDecoder):
    calibration = synthetic_calibration(TINY)
    one = replace(calibration, samples=calibration.samples[:1])
    caption = torch.zeros(4, TINY.caption_width)
    names = ("patch_blocks.1.attn", "pixel_blocks.0.attn")
    found: dict[str, list[list[float]]] = {name: [] for name in names}

    def kernel(name: str):
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found[name].append([tensor.abs().max().item() for tensor in (q, k, v)])
            return F.scaled_dot_product_attention(q, k, v)

        return attend

    modules = attentions(network)
    own = {name: kernel(name) for name in names}
    for name in names:
        modules[name].kernel = own[name]
    try:
        ranges, _ = calibrate(network, one, caption, (), names, ignore_progress)
        assert {name: modules[name].kernel for name in names} == own
    finally:
        for name in names:
            modules[name].kernel = None
    assert {len(calls) for calls in found.values()} == {4}
    for name in names:
        expected = [max(values) for values in zip(*found[name], strict=True)]
        assert ranges.attentions[name] == AttentionRange(*expected)
    assert ranges.inputs == {}


def test_the_same_seed_gives_the_same_image(network: FoldedDecoder):
    one, caption = synthetic_calibration(TINY).samples[0], torch.zeros(4, TINY.caption_width)
    assert torch.equal(decode(network, one, caption, 1), decode(network, one, caption, 1))
    assert psnr(decode(network, one, caption, 1), decode(network, one, caption, 2)) < 30


def test_the_psnr_of_an_image_with_nan_is_not_that_of_identical_images():
    image = torch.zeros(3, 2, 2)
    assert psnr(image, image) == 99.0
    assert math.isnan(psnr(image, image.index_fill(0, torch.tensor([1]), math.nan)))


def test_a_calibration_image_with_nan_is_an_error(network: FoldedDecoder):
    damaged = shallow_copy(network)
    damaged.final_layer.linear = copy.deepcopy(network.final_layer.linear)
    damaged.final_layer.linear.bias[0] = math.nan
    (item, *_) = synthetic_calibration(TINY).samples
    with pytest.raises(VerificationError, match="to infinity or NaN; leave it out of the calibration"):
        decode(damaged, item, torch.zeros(5, 24), 0)


def test_a_quantised_copy_shares_all_other_layers(network: FoldedDecoder):
    layer = "patch_blocks.0.mlp_x.w2"
    copy = with_quantised(network, {layer: 3.0}, {"patch_blocks.0.attn": AttentionRange(4.0, 1.5, 3.0)})
    assert isinstance(copy.get_submodule(layer), Fp8Linear)
    assert isinstance(network.get_submodule(layer), nn.Linear)
    assert copy.y_embedder.proj.weight.data_ptr() == network.y_embedder.proj.weight.data_ptr()
    assert network.get_submodule("patch_blocks.0.attn").fp8 is None
    half = shallow_copy(copy, torch.bfloat16)
    scales = half.get_submodule("patch_blocks.0.attn.fp8").state_dict()
    assert scales == {"q_scale": 2.0**-8, "k_scale": 2.0**-8, "v_scale": 2.0**-7}
    assert {scale.dtype for scale in scales.values()} == {torch.float32}
    assert half.get_submodule(layer).weight_scale.dtype == torch.float32
    assert (half.dtype, half.modulation_table.dtype) == (torch.bfloat16, torch.float32)


def test_a_trial_network_computes_what_the_quantised_network_does(network: FoldedDecoder):
    probe = verify_fold.make_probe(TINY)
    ranges = {"pixel_blocks.0.attn": AttentionRange(20.0, 5.0, 3.0)}
    layers = QuantisedLayers(network, {"patch_blocks.0.mlp_x.w2": 8.0, "pixel_blocks.0.expand_from_attn": 8.0})
    original = verify_fold.velocities(network, probe)
    trial = TrialNetwork(network, layers, torch.device("cpu"))
    mixtures = (("fp4", "fp8"), ("16bit", "fp4"), ("fp8", "16bit"))
    results = []
    for precisions in mixtures:
        mixture = dict(zip(layers.largest_inputs, precisions, strict=True))
        quantised = layers.network(mixture)
        set_fp8_attention(quantised, ranges)
        trial.set(mixture, ranges)
        results.append(verify_fold.velocities(trial.decoder, probe))
        assert torch.equal(results[-1], verify_fold.velocities(quantised, probe))
    assert len({result.sum().item() for result in (original, *results)}) == 4
    trial.set(dict.fromkeys(layers.largest_inputs, "16bit"), {})
    assert torch.equal(verify_fold.velocities(trial.decoder, probe), original)


def test_a_trial_network_on_another_device_leaves_the_network_where_it_is(network: FoldedDecoder):
    layers = QuantisedLayers(network, {"patch_blocks.0.mlp_x.w2": 8.0, "pixel_blocks.0.expand_from_attn": 8.0})
    trial = TrialNetwork(network, layers, torch.device("meta"))
    trial.set(dict(zip(layers.largest_inputs, ("fp4", "fp8"), strict=True)), {})
    assert all(tensor.is_meta for tensor in (*trial.decoder.parameters(), *trial.decoder.buffers()))
    originals = [network, *(layers.make(name, precision) for name in layers.largest_inputs for precision in KINDS)]
    tensors = [tensor for module in originals for tensor in (*module.parameters(), *module.buffers())]
    assert not any(tensor.is_meta for tensor in tensors)


def test_the_error_of_a_layer_or_attention_is_measured_with_only_this_one_quantised(network: FoldedDecoder):
    probe = verify_fold.make_probe(TINY)
    expected = verify_fold.velocities(network, probe)
    largest = {"patch_blocks.0.mlp_x.w2": 8.0, "pixel_blocks.0.expand_from_attn": 8.0}
    attention = {
        "patch_blocks.0.attn": AttentionRange(9.0, 4.0, 2.0),
        "pixel_blocks.0.attn": AttentionRange(9.0, 4.0, 2.0),
    }
    layers = QuantisedLayers(network, largest)
    measured = list(measure_errors(network, layers, attention, ("fp8", "fp4"), probe, expected))
    pairs = [(name, precision) for name in largest for precision in ("fp8", "fp4")]
    assert [(error.name, error.precision) for error in measured] == [*pairs, *((name, "fp8") for name in attention)]
    for name, precision, error in ((error.name, error.precision, error.value) for error in measured):
        alone = with_quantised(
            network,
            {layer: value for layer, value in largest.items() if layer == name},
            {other: value for other, value in attention.items() if other == name},
            KINDS[precision],
        )
        alone = verify_fold.velocities(alone, probe)
        first, last = (MODEL_TIMESTEPS.index(t) * len(verify_fold.SIGMAS) for t in (0.999, 0.342))
        errors = verify_fold.image_errors(alone, expected)
        assert error == pytest.approx(max(errors[first].item(), errors[last].item()), rel=1e-3)
        assert error > 0


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"image": torch.zeros(1)}, r"must contain a tensor 'latent' \[16, h, w\], found none"),
        ({"latent": torch.zeros(4, 8, 8)}, r"found \[4, 8, 8\]"),
        ({"latent": torch.full((16, 2, 2), torch.nan)}, "finite"),
        ({"latent": torch.zeros(16, 2, 2), "caption": torch.zeros(3, 24)}, r"'caption' in .* has shape \[3, 24\]"),
        ({"latent": torch.zeros(16, 2, 2), "sigma": torch.tensor(1.5)}, "a single number from 0 to 1"),
    ],
)
def test_an_invalid_calibration_file_is_named(tensors: dict[str, torch.Tensor], expected: str, tmp_path: Path):
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match=expected) as caught:
        load_calibration(tmp_path, TINY, caption_tokens=12)
    assert "one.safetensors" in str(caught.value)


def test_calibration_files_are_loaded_from_a_directory(tmp_path: Path):
    with pytest.raises(ConfigError, match="contains no"):
        load_calibration(tmp_path, TINY, 12)
    latent, caption = torch.randn(1, 16, 2, 3).half(), torch.randn(12, 24)
    save_file({"latent": latent, "caption": caption, "sigma": torch.tensor(0.25)}, tmp_path / "a.safetensors")
    (one,) = load_calibration(tmp_path, TINY, 12).samples
    assert torch.equal(one.latent, latent[0].float())
    assert one.sigma == 0.25
    assert one.caption is not None


@pytest.fixture(scope="session")
def fp8_bundle(build_once: BuildOnce) -> Path:
    """The bundled decoder in FP8 for PyTorch, calibrated with the photo that ships with it."""

    def build(directory: Path) -> None:
        arguments = ["--decoder", "dct-demo", "--target", "cpu", "--precision", "fp8", "--sizes", "256x256"]
        arguments += ["--keep", "pixel_blocks.*.modulation_in", "--output", str(directory / "bundle")]
        assert main(arguments) == 0

    return build_once("fp8-bundle", build) / "bundle"


def test_fp8_preserves_the_images_of_the_bundled_decoder(fp8_bundle: Path):
    """Decode twenty crops of a photo that the decoder was not trained on, with and without FP8, with the same noise."""
    manifest = open_bundle(fp8_bundle).manifest
    assert manifest.precision == "fp8"
    assert manifest.quantisation is not None
    assert manifest.quantisation.image_psnr >= 35
    report = json.loads((fp8_bundle / "report.json").read_text())
    assert len(report["network"]["quantisation"]["pictures"]) == 20


def test_an_fp8_bundle_loads_with_its_layers_in_fp8(fp8_bundle: Path):
    bundle = open_bundle(fp8_bundle)
    network = load_folded(bundle)
    in_fp8 = {name for name, module in network.named_modules() if isinstance(module, Fp8Linear)}
    rules = assign_rules(linear_layers(network), ["pixel_blocks.*.modulation_in"])
    assert in_fp8 == {layer for layer, rule in rules.items() if rule.quantised}
    assert bundle.manifest.quantisation is not None
    assert bundle.manifest.quantisation.layers == len(in_fp8)
    assert network.dtype == torch.bfloat16


def test_the_report_shows_rules_calibration_and_images(fp8_bundle: Path):
    html = (fp8_bundle / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 12
    assert "--keep pixel_blocks.*.modulation_in" in html
    assert "20 crops of the photo" in html
    assert "<script" not in html


def test_synthetic_latents_are_used_only_if_there_are_no_others(tmp_path: Path):
    demo = make_plan(BuildOptions("dct-demo", "cpu", tmp_path / "out", precision="fp8"))
    assert not select_calibration(demo, 1).synthetic
    assert demo.warnings == ()
    flux = make_plan(BuildOptions("flux-2k", "cpu", tmp_path / "out", random_seed=0, precision="fp8"))
    assert select_calibration(flux, 300).synthetic
    assert any("synthetic latents" in warning for warning in flux.warnings)


@pytest.mark.parametrize(
    ("quantisation", "expected"), [(None, 35.0), (36.0, 33.0), (50.0, 35.0)], ids=["none", "close", "far"]
)
def test_engines_may_differ_from_pytorch_as_two_correct_implementations_do(
    quantisation: float | None, expected: float, tmp_path: Path
):
    plan = make_plan(BuildOptions("dct-demo", "cpu", tmp_path / "out", precision="fp8"))
    measured = None if quantisation is None else SimpleNamespace(mean_psnr=quantisation)
    network: Any = SimpleNamespace(quantisation=measured)
    assert _minimum_of_engines(plan, network) == expected
