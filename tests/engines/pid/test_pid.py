"""Configuration, sampler and network: what is refused, and the parts that parity alone would not pin down."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engines.errors import ConfigError, InputError
from engines.pid import NoiseSource, PidConfig, PidDecoder, fold, sample
from engines.pid.network import Conditioning
from engines.pid.positions import pixel_axis
from engines.pid.sampler import MODEL_TIMESTEPS, STEP_TRANSITIONS, TIMESTEPS, advance, step_indices, step_times

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
        ("changes", "says"),
        [
            ({"rope_mode": "plain"}, "rope_mode"),
            ({"in_channels": 4}, "in_channels"),
            ({"lq_gate_type": "none"}, "lq_gate_type"),
            ({"hiden_size": 48}, "hiden_size"),
            ({"num_groups": 5}, "num_heads"),
            ({"pixel_hidden_size": 6}, "pixel_channels"),
            ({"sr_scale": 1}, "patches"),
            ({"lq_latent_channels": 18, "lq_latent_unpatchify_factor": 2, "sr_scale": 8}, "packings"),
        ],
    )
    def test_a_network_that_cannot_be_is_one_sentence(self, changes: dict, says: str):
        with pytest.raises(ConfigError, match=says):
            tiny(**changes)

    def test_latent_sizes(self):
        config = tiny()
        assert config.latent_size((2048, 1536)) == (64, 48)
        for size in ((2048, 1000), (0, 32), (-32, 32)):
            with pytest.raises(ConfigError, match="multiples of 32"):
                config.latent_size(size)


class TestSampler:
    def test_fewer_steps_visit_the_published_subset_of_the_times(self):
        assert step_times(4) == TIMESTEPS
        assert step_times(3) == (0.999, 0.866, 0.342, 0.0)
        assert step_times(2) == (0.999, 0.634, 0.0)
        assert step_times(1) == (1.0, 0.0)
        for steps in (0, 5, -1):
            with pytest.raises(InputError, match="steps"):
                step_times(steps)

    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    def test_step_indices_walk_from_noise_to_the_image(self, steps: int):
        walk = [STEP_TRANSITIONS[index] for index in step_indices(steps)]
        assert walk[-1][1] == 0
        assert all(there == start for (_, there), (start, _) in pairwise(walk))
        assert {t for t, _ in walk} <= set(MODEL_TIMESTEPS)

    def test_a_step_to_zero_needs_no_noise_and_ignores_it(self):
        x, v, noise = torch.randn(3, 1, 3, 2, 2)
        assert torch.equal(advance(x, v, 0.342, 0.0, None), advance(x, v, 0.342, 0.0, noise))

    def test_too_little_noise_is_refused(self):
        decoder = PidDecoder(tiny())
        with pytest.raises(InputError, match="3 step noises"):
            sample(decoder, conditioning(decoder), torch.zeros(1, 3, 64, 64), 0.0, [], steps=4)

    @pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
    def test_every_seed_of_64_bits_draws(self, seed: int):
        first, again = NoiseSource(seed, "cpu"), NoiseSource(seed, "cpu")
        assert torch.equal(first.draw((16, 16)), again.draw((16, 16)))
        state = first.state()
        drawn = first.draw((16, 16))
        first.restore(state)
        assert torch.equal(first.draw((16, 16)), drawn)


def conditioning(decoder: PidDecoder, batch: int = 1) -> Conditioning:
    return decoder.condition(torch.randn(batch, 16, 2, 2), torch.randn(batch, 5, 24), (64, 64))


class TestNetwork:
    @pytest.mark.parametrize(
        ("latent", "caption"),
        [((1, 4, 2, 2), (1, 5, 24)), ((1, 16, 2, 3), (1, 5, 24)), ((16, 2, 2), (1, 5, 24))],
    )
    def test_latents_that_do_not_fit_are_refused(self, latent: tuple, caption: tuple):
        with pytest.raises(InputError, match="latents"):
            PidDecoder(tiny()).condition(torch.zeros(latent), torch.zeros(caption), (64, 64))

    @pytest.mark.parametrize("caption", [(1, 13, 24), (1, 0, 24), (1, 5, 23), (5, 24)])
    def test_captions_that_do_not_fit_are_refused(self, caption: tuple):
        with pytest.raises(InputError, match="caption"):
            PidDecoder(tiny()).condition(torch.zeros(1, 16, 2, 2), torch.zeros(caption), (64, 64))

    def test_a_folded_network_knows_its_times_and_no_others(self):
        decoder = PidDecoder(tiny())
        folded = fold(decoder, (0.999, 0.5))
        x, prepared = torch.randn(2, 3, 64, 64), conditioning(decoder, 2)
        for t in (0.5, torch.tensor([0.999, 0.5])):
            assert torch.allclose(
                folded.velocity(x, t, prepared, 0.1), decoder.velocity(x, t, prepared, 0.1), atol=1e-5
            )
        with pytest.raises(InputError, match=r"0\.7"):
            folded.velocity(x, 0.7, prepared, 0.0)

    def test_folding_drops_what_nothing_reads(self):
        config = tiny()
        live, folded = PidDecoder(config), fold(PidDecoder(config), MODEL_TIMESTEPS)
        names = {name for name, _ in folded.named_parameters()}
        assert not any("adaLN" in name or name.startswith("t_embedder") for name in names)
        last = f"patch_blocks.{config.patch_depth - 1}."
        assert not any(name.startswith((f"{last}mlp_y", f"{last}norm_y2", f"{last}attn.proj_y")) for name in names)
        parameters = [sum(p.numel() for p in net.parameters()) for net in (live, folded)]
        assert parameters[1] < parameters[0]

    def test_half_precision_stays_near_single(self):
        torch.manual_seed(0)
        decoder = PidDecoder(tiny())
        x, latent, caption = torch.randn(1, 3, 64, 64), torch.randn(1, 16, 2, 2), torch.randn(1, 5, 24)
        exact = decoder.velocity(x, 0.9, decoder.condition(latent, caption, (64, 64)), 0.2)
        decoder.to(torch.bfloat16)
        rough = decoder.velocity(x, 0.9, decoder.condition(latent, caption, (64, 64)), 0.2)
        assert rough.dtype == torch.float32
        assert ((rough - exact).norm() / exact.norm()) < 0.05

    def test_pixel_coordinates_stop_at_the_end_of_the_trained_range(self):
        table = pixel_axis(4096, 8, torch.device("cpu"))
        assert torch.equal(table[3840], table[4095])
        assert not torch.equal(table[3839], table[3840])

    def test_it_can_be_trained(self):
        decoder = PidDecoder(tiny())
        decoder.pixel_memory_budget = 1
        decoder.velocity(torch.randn(1, 3, 64, 64), 0.9, conditioning(decoder), 0.2).square().mean().backward()
        unused = {name for name, parameter in decoder.named_parameters() if parameter.grad is None}
        last = "patch_blocks.1."  # its caption output feeds nothing
        assert all(name.startswith(last) and "_y" in name for name in unused)
