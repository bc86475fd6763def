"""Two decoders on one device that share buffers: images, slots and memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.errors import DecodeError
from engines.pid import PidDecoder, fold
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS, step_indices
from engines.runtime.backend import Backend
from engines.runtime.buffers import DeviceBuffers, Needs, runtime_needs
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size
from tests.conftest import BuildOnce
from tests.engines.runtime.runtimes import CONFIG, INFO, SIZE, WIDE, decode, make_backend, make_decoder, params, step

CPU = torch.device("cpu")
IN_TILES = Size(96, 128)
OTHER_CONFIG = replace(CONFIG, hidden_size=96, num_heads=6, patch_depth=2, caption_width=40, latent_channels=4)
OTHER_INFO = replace(
    INFO,
    decoder="other",
    latent_channels=4,
    caption_tokens=3,
    caption_width=40,
    sizes=(Size(96, 64), SIZE),
    max_batch=1,
    max_pixels=IN_TILES.area,
)
NEEDS = runtime_needs(CONFIG, torch.float32, INFO)
OTHER_NEEDS = runtime_needs(OTHER_CONFIG, torch.bfloat16, OTHER_INFO)


def other_backend(device: torch.device = CPU) -> TorchBackend:
    """Return a decoder of another shape and dtype, always with the same weights."""
    torch.manual_seed(1)
    return TorchBackend(fold(PidDecoder(OTHER_CONFIG), MODEL_TIMESTEPS).bfloat16().to(device))


def open_both(
    backend: Backend, buffers: DeviceBuffers | None = None, other: Backend | None = None
) -> tuple[DeviceRuntime, DeviceRuntime]:
    """Return warm runtimes of two decoders, which share `buffers` if they are given."""
    first = DeviceRuntime(backend, torch.zeros(5, 24), INFO, buffers)
    second = DeviceRuntime(other or other_backend(), torch.zeros(3, 40), OTHER_INFO, buffers)
    first.warm_up()
    second.warm_up()
    return first, second


def sample_of(info: RuntimeInfo, size: Size, number: int) -> Sample:
    """Return a sample that depends on `number`."""
    generator = torch.Generator().manual_seed(number)
    caption = torch.randn(info.caption_tokens, info.caption_width, generator=generator)
    latent = torch.randn(info.latent_channels, *info.latent_size(size), generator=generator)
    return Sample(latent, size, 0.1 * number, number, caption)


def decode_in_turns(runtimes: tuple[DeviceRuntime, DeviceRuntime]) -> list[np.ndarray]:
    """Decode an image of the first decoder and two of the second, one of them in tiles: one step of each in turn.

    All are finished before the first one has arrived, so that one could overwrite another.

    Returns:
        The previews of each step, and then the images.
    """
    first, second = runtimes
    images = [(first, WIDE), (second, Size(96, 64)), (second, IN_TILES)]
    slots = [runtime.start(sample_of(runtime.info, size, i)) for i, (runtime, size) in enumerate(images)]
    results = []
    for index in step_indices(MAX_STEPS):
        for (runtime, size), slot in zip(images, slots, strict=True):
            step(runtime, slot, index, size)
            results.append(runtime.preview(slot))
    finished = [runtime.finish(slot) for (runtime, _), slot in zip(images, slots, strict=True)]
    for (runtime, size), slot, rows in zip(images, slots, finished, strict=True):
        rows.wait(size.height)
        results.append(rows.pixels.copy())
        rows.close()
        runtime.release(slot)
    return results


@pytest.mark.computes
@pytest.mark.parametrize("name", params(("torch-cpu", "torch-cuda", "fake-engines")))
def test_images_of_decoders_in_turns_are_those_of_separate_runtimes(name: str, tmp_path: Path, build_once: BuildOnce):
    backend = make_backend(name, tmp_path, build_once)
    other = other_backend(backend.device)
    separate = decode_in_turns(open_both(backend, other=other))
    shared = decode_in_turns(open_both(backend, DeviceBuffers(backend.device), other))
    assert all(np.array_equal(image, expected) for image, expected in zip(shared, separate, strict=True))
    assert len({image.tobytes() for image in shared[:-3]}) == 12  # the last previews are the images


def test_nan_in_one_decoder_does_not_reach_another():
    first, second = open_both(TorchBackend(make_decoder("cpu")), DeviceBuffers(CPU))
    request = sample_of(first.info, SIZE, 1)
    expected = decode(first, request)
    bad = sample_of(second.info, IN_TILES, 2)
    slot = second.start(replace(bad, latent=torch.full_like(bad.latent, torch.nan)))
    for index in step_indices(MAX_STEPS):
        step(second, slot, index, IN_TILES)
        second.preview(slot)
    second.finish(slot).close()
    second.release(slot)
    assert np.array_equal(decode(first, request), expected)


def test_all_decoders_together_have_as_many_images_as_slots():
    first, second = open_both(TorchBackend(make_decoder("cpu")), DeviceBuffers(CPU))
    sample, other = sample_of(first.info, SIZE, 0), sample_of(second.info, SIZE, 0)
    slots = [first.start(sample), second.start(other), second.start(other), first.start(sample)]
    assert sorted(slots) == [0, 1, 2, 3]
    for runtime, request in ((first, sample), (second, other)):
        with pytest.raises(DecodeError, match="All slots of the device"):
            runtime.start(request)
    second.release(slots[1])
    assert first.start(sample) == slots[1]


def storage_bytes(buffers: DeviceBuffers) -> int:
    """Return the bytes of all tensors on the device that the buffers hold."""
    tensors = [*buffers._tensors.values(), *(staged.view((0,)) for staged in buffers._staged.values())]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_the_memory_is_the_maximum_of_what_the_decoders_need():
    buffers = DeviceBuffers(CPU)
    open_both(TorchBackend(make_decoder("cpu")), buffers)
    own, other = (sum(needs.device_bytes().values()) for needs in (NEEDS, OTHER_NEEDS))
    assert max(own, other) <= storage_bytes(buffers) < own + other
    assert storage_bytes(buffers) == sum(NEEDS.combined(OTHER_NEEDS).device_bytes().values())
    assert buffers.needs == NEEDS.combined(OTHER_NEEDS)


def test_what_either_needs_is_the_maximum_of_each_buffer():
    combined = Needs(2, {"image": 5, "latent": 1}).combined(Needs(3, {"image": 4, "tile x": 7}))
    assert combined == Needs(3, {"image": 5, "latent": 1, "tile x": 7})
    assert combined.device_bytes() == {"slots": 0, "tiles": 3 * 7 * 4, "other": 5 + 4}


def test_the_memory_of_a_slot_is_that_of_the_largest_decoder():
    assert OTHER_NEEDS.counts["slots"] != NEEDS.counts["slots"]
    largest = max(needs.counts["slots"] for needs in (NEEDS, OTHER_NEEDS))
    assert NEEDS.combined(OTHER_NEEDS).device_bytes()["slots"] == 4 * largest


def test_a_second_warm_up_moves_no_buffer():
    buffers = DeviceBuffers(CPU)
    first, second = open_both(TorchBackend(make_decoder("cpu")), buffers)
    request, address = sample_of(second.info, SIZE, 1), buffers.tensor("image").data_ptr()
    expected = decode(second, request)
    first.warm_up()
    assert buffers.tensor("image").data_ptr() == address
    assert np.array_equal(decode(second, request), expected)


def test_the_memory_is_freed_with_the_last_runtime_at_once():
    buffers = DeviceBuffers(CPU)
    first, second = open_both(TorchBackend(make_decoder("cpu")), buffers)
    image = weakref.ref(buffers.tensor("image"))
    gc.disable()
    try:
        first.close()
        del first, buffers
        assert image() is not None
        decode(second, sample_of(second.info, SIZE, 1))
        second.close()
        del second
        assert image() is None
    finally:
        gc.enable()


def test_activations_are_shared_unless_a_later_runtime_needs_more():
    buffers = DeviceBuffers(CPU)
    first, second, third = (buffers.activations(count) for count in (1000, 700, 1200))
    assert second.data_ptr() == first.data_ptr()
    assert third.data_ptr() != first.data_ptr()
    assert buffers.activations(1).data_ptr() == third.data_ptr()
    assert all(memory.data_ptr() % 256 == 0 for memory in (first, third))
    assert (first.nbytes, third.nbytes) == (1000, 1200)
