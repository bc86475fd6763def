"""Images in tiles on a device: the values, the noise, failures and memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.benchmark.decoders import make_runtime
from engines.bundled import dct
from engines.bundled import decoder as bundled
from engines.compile.comparison import psnr
from engines.errors import DecodeError
from engines.pid import NoiseSource, PidDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS, STEP_TRANSITIONS, advance, step_indices
from engines.pixels import from_uint8, to_uint8
from engines.runtime.buffers import DeviceBuffers, runtime_needs
from engines.runtime.cuda_graphs import CudaGraphRunner, EagerRunner
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.previews import preview
from engines.runtime.protocol import Sample, preview_size
from engines.runtime.tiled_images import TileBuffers, TiledImage
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size
from tests.engines.runtime.runtimes import (
    CONFIG,
    IN_TILES,
    INFO,
    SIZE,
    TILED_INFO,
    decode,
    levels,
    make_decoder,
    make_sample,
    pixels,
    ready,
    step,
)
from tests.engines.runtime.test_device_runtime import OneBadValue, broken, live_tensor_bytes

TILES = len(TILED_INFO.tiles(IN_TILES) or ())


@torch.inference_mode()
def decode_with_blended_velocities(request: Sample, caption: Tensor, device: torch.device) -> Tensor:
    """Decode in the tiles of TILED_INFO, with the sampler for the whole image."""
    plan = TILED_INFO.tiles(request.size)
    assert plan is not None
    decoder, cell, (height, width) = make_decoder(device), TILED_INFO.cell_side, plan.tile
    noise = NoiseSource(request.seed, device)
    x = noise.draw(request.size)[None]
    for t, next_t in (STEP_TRANSITIONS[index] for index in step_indices(4)):
        velocity = torch.zeros_like(x)
        for i in range(len(plan)):
            top, left = plan.corner(i)
            area = np.s_[..., top : top + height, left : left + width]
            cells = np.s_[..., top // cell : (top + height) // cell, left // cell : (left + width) // cell]
            conditioning = decoder.condition(request.latent[None].to(device)[cells], caption[None], plan.tile)
            rows, columns = (torch.tensor(weights, device=device) for weights in plan.weights(i))
            weights = rows[:, None] * columns
            velocity[area] += weights * decoder.velocity(x[area], t, conditioning, request.sigma)
        x = advance(x, velocity, t, next_t, noise.draw(request.size)[None])
    return x[0]


class TestOnDevice:
    @pytest.mark.computes
    def test_the_image_is_that_of_the_sampler_with_blended_velocities(self, tiled_on_device: DeviceRuntime):
        """In particular it has the noise of an image that is decoded as a whole."""
        caption = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
        request, device = make_sample(7, IN_TILES, sigma=0.4, caption=caption), tiled_on_device.device
        image = decode_with_blended_velocities(request, caption.to(device), device)
        expected = to_uint8(image).permute(1, 2, 0).cpu().numpy().astype(int)
        assert np.abs(decode(tiled_on_device, request) - expected).max() <= levels(tiled_on_device)

    def test_a_failed_tile_can_be_repeated_with_the_same_result(self, tiled_on_device: DeviceRuntime, monkeypatch):
        expected = decode(tiled_on_device, make_sample(1, IN_TILES))
        slot = tiled_on_device.start(make_sample(1, IN_TILES))
        for index in step_indices(4):
            for _ in range(TILES):
                with monkeypatch.context() as patch:
                    for runner in (EagerRunner, CudaGraphRunner):
                        patch.setattr(runner, "run", broken)
                    with pytest.raises(DecodeError):
                        tiled_on_device.step([slot], [index])
                tiled_on_device.step([slot], [index])
        assert (pixels(tiled_on_device, slot) == expected).all()

    def test_a_failure_after_the_last_tile_adds_no_tile_twice(self, tiled_on_device: DeviceRuntime, monkeypatch):
        expected = decode(tiled_on_device, make_sample(1, IN_TILES))
        slot = tiled_on_device.start(make_sample(1, IN_TILES))
        first, *rest = step_indices(4)
        for _ in range(TILES - 1):
            tiled_on_device.step([slot], [first])
        with monkeypatch.context() as patch:
            patch.setattr(NoiseSource, "draw_into", draw_and_fail)
            with pytest.raises(DecodeError):
                tiled_on_device.step([slot], [first])
        tiled_on_device.step([slot], [first])
        for index in rest:
            step(tiled_on_device, slot, index, IN_TILES)
        assert (pixels(tiled_on_device, slot) == expected).all()

    @pytest.mark.computes
    def test_a_value_that_is_not_finite_is_an_error_instead_of_an_image(self, tiled_on_device: DeviceRuntime):
        runtime = ready(OneBadValue(tiled_on_device.backend), TILED_INFO)
        slot = runtime.start(make_sample(size=IN_TILES))
        step(runtime, slot, 0, IN_TILES)
        rows = runtime.finish(slot)
        with pytest.raises(DecodeError, match="NaN or infinity"):
            rows.wait(IN_TILES.height)
        rows.close()
        runtime.release(slot)

    def test_memory_does_not_grow_over_decodes(self, tiled_on_device: DeviceRuntime):
        sizes = (IN_TILES, Size(96, 160), SIZE)
        for size in sizes:
            decode(tiled_on_device, make_sample(size=size))
        tensors = live_tensor_bytes()
        for i in range(6):
            decode(tiled_on_device, make_sample(i, sizes[i % 3]))
        assert live_tensor_bytes() == tensors


def test_the_bundled_decoder_decodes_a_photo_in_tiles_as_without_them():
    decoder, image, tile = PidDecoder(bundled.CONFIG), Size(384, 512), Size(256, 256)
    decoder.load_state_dict(load_file(bundled.CHECKPOINT))
    folded = fold(decoder, MODEL_TIMESTEPS)
    photo = bundled.read_photo()[None, :, : image.height, : image.width]
    request = Sample(dct.encode(dct.downscale(photo))[0], image, seed=1)
    images = []
    for size, max_pixels in ((image, None), (tile, image.area)):
        runtime = make_runtime(folded, bundled.DESCRIPTION, [size], 1, "fp32", max_pixels=max_pixels)
        runtime.warm_up()
        images.append(from_uint8(torch.from_numpy(decode(runtime, request))))
    assert psnr(*images) > 45


@pytest.mark.parametrize("image", [Size(704, 1056), Size(2048, 64)], ids=["scaled down", "higher than the scratch"])
def test_a_preview_is_that_of_the_whole_image(image: Size):
    """It is written in strips, because it can be larger than all buffers for a tile."""
    info = replace(INFO, max_pixels=image.area)
    plan = info.tiles(image)
    assert plan is not None
    buffers = DeviceBuffers(torch.device("cpu"))
    buffers.reserve(runtime_needs(CONFIG, torch.float32, info))
    buffers.allocate()
    tiled, noise = TiledImage(plan, info, TileBuffers.of_slot(buffers, 0)), NoiseSource(0, "cpu")
    tiled.start(noise, torch.zeros(16, *info.latent_size(image)), torch.zeros(1, 5, 24))
    index, before = 0, noise.state()
    while tiled.next_tile < len(plan):
        tiled.add_tile(torch.randn(3, *plan.tile) * (1 - STEP_TRANSITIONS[index][1]))
    tiled.end_step(index, noise)
    written = torch.zeros(*preview_size(image), 3, dtype=torch.uint8)
    tiled.write_preview(index, written, scratch=torch.zeros(3 * SIZE.area))
    x, latent = torch.zeros(3, *image), torch.zeros(16, *info.latent_size(plan.tile))
    for i in range(len(plan)):
        tile = torch.zeros(3, *plan.tile)
        tiled.next_tile = i
        tiled.read_tile(tile, latent)
        top, left = plan.corner(i)
        x[:, top : top + plan.tile.height, left : left + plan.tile.width] = tile
    noise.restore(before)
    expected = preview(x[None], noise.draw(image)[None], torch.tensor([STEP_TRANSITIONS[index][1]]))
    assert (written.int() - expected.int()).abs().max() <= 1


def test_too_few_pixels_for_any_tiles_mean_that_there_are_none():
    assert INFO.with_tiles(6144).max_pixels == 6144  # 96x64, in tiles of 64x64
    info = INFO.with_tiles(6143)
    assert info.max_pixels is None
    runtime = ready(TorchBackend(make_decoder("cpu")), info)
    with pytest.raises(DecodeError, match="does not support"):
        runtime.start(make_sample(size=Size(96, 64)))


def draw_and_fail(source: NoiseSource, out: Tensor) -> None:
    torch.randn(out.shape, generator=source.generator, out=out)
    raise RuntimeError("a kernel failed")
