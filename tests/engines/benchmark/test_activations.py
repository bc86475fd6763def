"""What the folded, chunked network saves, counted at full size on tensors without data; nothing is computed."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.benchmark.activations import PeakActivations
from engines.benchmark.roofline import count_flops
from engines.pid import FoldedDecoder, PidDecoder, released
from engines.pid.sampler import MODEL_TIMESTEPS

SIZE = (1024, 1024)


def peak_of_a_step(decoder: PidDecoder | FoldedDecoder) -> int:
    config = decoder.config
    latent = torch.empty(1, config.latent_channels, *config.latent_size(SIZE))
    conditioning = decoder.condition(latent, torch.empty(1, config.caption_tokens, config.caption_width), SIZE)
    x, sigma = torch.empty(1, 3, *SIZE), torch.empty(1)
    with PeakActivations() as memory:
        if isinstance(decoder, FoldedDecoder):
            decoder.velocity_at(x, torch.zeros(1, dtype=torch.long), conditioning, sigma)
        else:
            decoder.velocity(x, torch.empty(1), conditioning, sigma)
    return memory.peak


def test_a_step_takes_at_most_half_the_memory_of_the_published_way():
    config = released("flux-2k").config
    with FakeTensorMode(), torch.no_grad():
        live, folded = PidDecoder(config), FoldedDecoder(config, MODEL_TIMESTEPS)
        live.pixel_memory_budget = 2**62
        published, ours = peak_of_a_step(live), peak_of_a_step(folded)
    assert ours < published / 2


def test_a_smaller_budget_means_a_smaller_peak():
    with FakeTensorMode(), torch.no_grad():
        decoder = FoldedDecoder(released("flux-2k").config, MODEL_TIMESTEPS)
        peaks = []
        for budget in (2**62, 2**30, 2**26):
            decoder.pixel_memory_budget = budget
            peaks.append(peak_of_a_step(decoder))
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_peak_counts_what_is_alive_at_once_and_no_views():
    with PeakActivations() as memory:
        a = torch.zeros(100)
        b = a.view(10, 10)[:5]
        del a, b
        c = torch.zeros(50)
        c += 1
    assert (memory.peak, memory.live) == (400, 200)


def test_operations_agree_with_the_counts_known_for_a_2048_step():
    """13.0 + 23.9 in the patch blocks, 3.4 + 2.5 in the pixel blocks, about 0.9 in the gates, in TFLOP."""
    condition, step = count_flops(released("flux-2k").config, (2048, 2048), 300, 1)
    assert 42e12 < step < 45e12
    assert 0.2e12 < condition < 1.5e12
