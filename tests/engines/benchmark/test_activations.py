"""Memory that the folded, chunked network saves, counted at full size on tensors without data; nothing is computed."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.benchmark.activations import PeakActivations, peak_bytes, retained_bytes
from engines.benchmark.roofline import NO_CHUNKING
from engines.pid import FoldedDecoder, PidDecoder, released
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

SIZE = Size(1024, 1024)


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


def test_a_folded_step_needs_at_most_half_the_memory_of_the_published_one():
    config = released("flux-2k").config
    with FakeTensorMode(), torch.no_grad():
        live, folded = PidDecoder(config), FoldedDecoder(config, MODEL_TIMESTEPS)
        live.pixel_memory_budget = NO_CHUNKING
        published, ours = peak_of_a_step(live), peak_of_a_step(folded)
    assert ours < published / 2


def test_a_smaller_budget_means_a_smaller_peak():
    with FakeTensorMode(), torch.no_grad():
        decoder = FoldedDecoder(released("flux-2k").config, MODEL_TIMESTEPS)
        peaks = []
        for budget in (NO_CHUNKING, 2**30, 2**26):
            decoder.pixel_memory_budget = budget
            peaks.append(peak_of_a_step(decoder))
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_peak_counts_live_tensors_but_no_views():
    with PeakActivations() as memory:
        a = torch.zeros(100)
        b = a.view(10, 10)[:5]
        del a, b
        c = torch.zeros(50)
        c += 1
    assert (memory.peak, memory.live) == (400, 200)


def test_peak_and_retained_bytes_are_counted_on_the_cpu():
    kept = []

    def work() -> None:
        torch.zeros(100).add(1)
        kept.append(torch.zeros(50))

    assert peak_bytes(torch.device("cpu"), work) == 800
    assert retained_bytes(torch.device("cpu"), work) == 200
