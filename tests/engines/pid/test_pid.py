"""Configuration, sampler and network: rejected input, and details that the parity tests do not cover."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engines.errors import ConfigError, InputError
from engines.pid import NoiseSource, PidConfig, PidDecoder, fold, sample
from engines.pid.network import PIXEL_MEMORY_BUDGET, Conditioning
from engines.pid.positions import pixel_axis
from engines.pid.sampler import MODEL_TIMESTEPS, STEP_TRANSITIONS, TIMESTEPS, advance, step_indices, timesteps_for
from engines.size import Size

SIZE = Size(64, 64)
TINY = {
    "hidden_size": 48,
    "num_groups": 3,
    "patch_depth": 2,
    "pixel_depth": 1,
    "pixel_hidden_size": 4,
    "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2,
    "txt_embed_dim": 24,
    "txt_max_length": 12,
    "lq_hidden_dim": 16,
}


def tiny(**changes: object) -> PidConfig:
    return PidConfig.from_published({**TINY, **changes})


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rope_mode": "plain"}, "rope_mode"),
            ({"in_channels": 4}, "in_channels"),
            ({"lq_gate_type": "none"}, "lq_gate_type"),
            ({"hiden_size": 48}, "hiden_size"),
            ({"num_groups": 5}, "num_heads"),
            ({"pixel_hidden_size": 6}, "pixel_channels"),
            ({"sr_scale": 1}, "patches"),
            ({"lq_latent_channels": 18, "lq_latent_unpatchify_factor": 2, "sr_scale": 8}, "latent_unpatchify²"),
        ],
    )
    def test_an_invalid_configuration_is_an_error(self, changes: dict, message: str):
        with pytest.raises(ConfigError, match=message):
            tiny(**changes)

    def test_both_sides_must_be_multiples_of_the_cell(self):
        config = tiny()
        assert config.latent_size(Size(2048, 1536)) == Size(64, 48)
        for size in (Size(2048, 1000), Size(0, 32), Size(-32, 32)):
            with pytest.raises(ConfigError, match="multiples of 32"):
                config.latent_size(size)


class TestSampler:
    def test_fewer_steps_use_the_published_subset_of_the_timesteps(self):
        assert timesteps_for(4) == TIMESTEPS
        assert timesteps_for(3) == (0.999, 0.866, 0.342, 0.0)
        assert timesteps_for(2) == (0.999, 0.634, 0.0)
        assert timesteps_for(1) == (1.0, 0.0)
        for steps in (0, 5, -1):
            with pytest.raises(InputError, match="steps"):
                timesteps_for(steps)

    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    def test_step_indices_lead_from_noise_to_the_image(self, steps: int):
        path = [STEP_TRANSITIONS[index] for index in step_indices(steps)]
        assert path[-1][1] == 0
        assert all(end == start for (_, end), (start, _) in pairwise(path))
        assert {t for t, _ in path} <= set(MODEL_TIMESTEPS)

    def test_a_step_to_zero_needs_no_noise_and_ignores_it(self):
        x, v, noise = torch.randn(3, 1, 3, 2, 2)
        assert torch.equal(advance(x, v, 0.342, 0.0, None), advance(x, v, 0.342, 0.0, noise))

    def test_too_little_noise_is_rejected(self):
        decoder = PidDecoder(tiny())
        with pytest.raises(InputError, match="3 noise tensors"):
            sample(decoder, conditioning(decoder), torch.zeros(1, 3, 64, 64), 0.0, [], steps=4)

    @pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
    def test_every_64_bit_seed_is_reproducible(self, seed: int):
        size = Size(16, 16)
        first, again = NoiseSource(seed, "cpu"), NoiseSource(seed, "cpu")
        assert torch.equal(first.draw(size), again.draw(size))
        state = first.state()
        drawn = first.draw(size)
        first.restore(state)
        assert torch.equal(first.draw(size), drawn)


def conditioning(decoder: PidDecoder, batch: int = 1) -> Conditioning:
    return decoder.condition(torch.randn(batch, 16, 2, 2), torch.randn(batch, 5, 24), SIZE)


class TestNetwork:
    @pytest.mark.parametrize(
        ("latent", "caption"),
        [((1, 4, 2, 2), (1, 5, 24)), ((1, 16, 2, 3), (1, 5, 24)), ((16, 2, 2), (1, 5, 24))],
    )
    def test_latents_of_the_wrong_shape_are_rejected(self, latent: tuple, caption: tuple):
        with pytest.raises(InputError, match="latents"):
            PidDecoder(tiny()).condition(torch.zeros(latent), torch.zeros(caption), SIZE)

    @pytest.mark.parametrize("caption", [(1, 13, 24), (1, 0, 24), (1, 5, 23), (5, 24)])
    def test_captions_of_the_wrong_shape_are_rejected(self, caption: tuple):
        with pytest.raises(InputError, match="caption"):
            PidDecoder(tiny()).condition(torch.zeros(1, 16, 2, 2), torch.zeros(caption), SIZE)

    def test_a_folded_network_supports_only_its_timesteps(self):
        decoder = PidDecoder(tiny())
        folded = fold(decoder, (0.999, 0.5))
        x, prepared = torch.randn(2, 3, 64, 64), conditioning(decoder, 2)
        for t in (0.5, torch.tensor([0.999, 0.5])):
            assert torch.allclose(
                folded.velocity(x, t, prepared, 0.1), decoder.velocity(x, t, prepared, 0.1), atol=1e-5
            )
        with pytest.raises(InputError, match=r"0\.7"):
            folded.velocity(x, 0.7, prepared, 0.0)

    def test_folding_removes_what_nothing_reads(self):
        config = tiny()
        live, folded = PidDecoder(config), fold(PidDecoder(config), MODEL_TIMESTEPS)
        names = {name for name, _ in folded.named_parameters()}
        assert not any("adaLN" in name or name.startswith("t_embedder") for name in names)
        last = f"patch_blocks.{config.patch_depth - 1}."
        assert not any(name.startswith((f"{last}mlp_y", f"{last}norm_y2", f"{last}attn.proj_y")) for name in names)
        parameters = [sum(p.numel() for p in net.parameters()) for net in (live, folded)]
        assert parameters[1] < parameters[0]

    def test_half_precision_is_close_to_single_precision(self):
        torch.manual_seed(0)
        decoder = PidDecoder(tiny())
        x, latent, caption = torch.randn(1, 3, 64, 64), torch.randn(1, 16, 2, 2), torch.randn(1, 5, 24)
        exact = decoder.velocity(x, 0.9, decoder.condition(latent, caption, SIZE), 0.2)
        decoder.to(torch.bfloat16)
        rough = decoder.velocity(x, 0.9, decoder.condition(latent, caption, SIZE), 0.2)
        assert rough.dtype == torch.float32
        assert ((rough - exact).norm() / exact.norm()) < 0.05

    def test_pixel_positions_are_clamped_to_the_trained_range(self):
        table = pixel_axis(4096, 8, torch.device("cpu"))
        assert torch.equal(table[3840], table[4095])
        assert not torch.equal(table[3839], table[3840])

    @pytest.mark.parametrize("budget", [PIXEL_MEMORY_BUDGET, 10**5], ids=["whole", "chunked"])
    def test_inference_overwrites_pixels_but_computes_the_same(self, budget: int):
        torch.manual_seed(0)
        decoder = PidDecoder(tiny(pixel_depth=2))
        decoder.pixel_memory_budget = budget
        x, prepared = torch.randn(2, 3, 64, 64), conditioning(decoder, 2)
        noisy = x.clone()
        expected = decoder.velocity(x, 0.9, prepared, 0.2)  # builds the graph of gradients
        with torch.no_grad():
            torch.testing.assert_close(decoder.velocity(x, 0.9, prepared, 0.2), expected)
        assert torch.equal(x, noisy)

    def test_gradients_reach_all_used_parameters(self):
        decoder = PidDecoder(tiny())
        decoder.pixel_memory_budget = 1
        decoder.velocity(torch.randn(1, 3, 64, 64), 0.9, conditioning(decoder), 0.2).square().mean().backward()
        unused = {name for name, parameter in decoder.named_parameters() if parameter.grad is None}
        last = "patch_blocks.1."  # nothing reads its caption output
        assert all(name.startswith(last) and "_y" in name for name in unused)
