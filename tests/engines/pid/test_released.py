"""The released decoders by name, and properties of their networks, on the meta device."""

import pytest
import torch

from engines.pid import FoldedDecoder, PidDecoder, released
from engines.pid.released import released_names
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

SIZE = Size(2048, 2048)
NAMES = [
    *("flux-2k", "flux2-2k", "sd3-2k", "dinov2-2k", "siglip-2k"),
    *("sd3-2kto4k", "sdxl-2kto4k"),
    *("flux-2kto4k-v1.5", "flux2-2kto4k-v1.5", "qwenimage-2kto4k-v1.5"),
]


def on_meta(name: str) -> PidDecoder:
    with torch.device("meta"):
        return PidDecoder(released(name).config)


def weight_bytes(module: torch.nn.Module, dtype: torch.dtype) -> int:
    parameters = sum(p.numel() for p in module.parameters()) * dtype.itemsize
    return parameters + sum(b.numel() * b.element_size() for b in module.buffers())


def test_all_ten_decoders_are_available():
    assert set(released_names()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_description_is_consistent(name: str):
    decoder = released(name)
    config, space = decoder.config, decoder.latent_space
    assert decoder.name == name
    assert (config.latent_channels, config.pixels_per_cell) == (space.channels, space.pixels_per_cell)
    assert decoder.sizes[0] == SIZE
    for size in decoder.sizes:
        assert max(size) <= decoder.max_side
        assert config.latent_size(size)
    transposed = {(width, height) for height, width in decoder.sizes}
    assert transposed == set(decoder.sizes)


def test_latent_sizes_match_the_diffusion_models():
    assert released("flux-2k").config.latent_size(SIZE) == (64, 64)
    assert released("flux2-2kto4k-v1.5").config.latent_size(SIZE) == (32, 32)
    assert released("siglip-2k").config.latent_size(SIZE) == (16, 16)


def test_full_size_networks_have_the_published_number_of_parameters():
    v1, v15 = on_meta("flux-2k"), on_meta("flux-2kto4k-v1.5")
    assert sum(p.numel() for p in v1.parameters()) == 1_362_348_170
    assert len(v1.state_dict()) == 456
    # The published file: bfloat16, without the head used only in training, and 148 kB of names.
    assert 0 < 2_800_546_587 - 2 * sum(p.numel() for p in v15.parameters()) < 2**18
    assert len(v15.state_dict()) == 461


def test_folding_removes_the_modulation_layers_and_a_third_of_the_bytes():
    live = on_meta("flux-2k")
    with torch.device("meta"):
        folded = FoldedDecoder(live.config, MODEL_TIMESTEPS)
    modulations = [p.numel() for key, p in live.named_parameters() if key.startswith("patch_blocks") and "adaLN" in key]
    assert sum(modulations) == pytest.approx(397e6, rel=2e-3)
    assert not any("adaLN" in key for key in folded.state_dict())
    assert weight_bytes(folded, torch.bfloat16) <= 0.7 * weight_bytes(live, torch.bfloat16)


def test_sdxl_alone_is_in_the_variance_preserving_frame():
    frames = {released(name).latent_space.name: released(name).latent_space.sigma_frame for name in NAMES}
    assert [name for name, frame in frames.items() if frame != "flow"] == ["sdxl"]
    assert frames["sdxl"] == "variance-preserving"
