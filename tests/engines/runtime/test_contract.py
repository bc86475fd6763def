"""Contract tests that run on every runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engines.errors import DecodeError
from engines.pid.sampler import step_indices
from engines.runtime.protocol import Runtime
from engines.size import Size
from tests.engines.runtime.runtimes import IN_TILES, SIZE, WIDE, decode, levels, make_sample, pixels, step


class TestContract:
    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    @pytest.mark.parametrize("size", [SIZE, WIDE])
    def test_a_latent_becomes_a_uint8_image_of_the_requested_size(self, runtime: Runtime, size, steps: int):
        image = decode(runtime, make_sample(size=size), steps)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8

    def test_the_same_request_gives_the_same_image(self, runtime: Runtime):
        assert (decode(runtime, make_sample()) == decode(runtime, make_sample())).all()

    def test_images_at_different_steps_share_a_batch(self, runtime: Runtime):
        alone = [decode(runtime, make_sample(i)) for i in range(3)]
        slots = [runtime.start(make_sample(i)) for i in range(3)]
        plans = [list(step_indices(4)) for _ in range(3)]
        runtime.step([slots[0]], [plans[0].pop(0)])
        runtime.step(slots[:2], [plans[0].pop(0), plans[1].pop(0)])
        runtime.step(slots, [plan.pop(0) for plan in plans])
        runtime.step(slots[::-1], [plan.pop(0) for plan in plans[::-1]])
        runtime.step(slots[1:], [plan.pop(0) for plan in plans[1:]])
        runtime.step([slots[2]], [plans[2].pop(0)])
        for slot, expected in zip(slots, alone, strict=True):
            assert np.abs(pixels(runtime, slot).astype(int) - expected).max() <= levels(runtime)

    def test_a_paused_image_continues_where_it_stopped(self, runtime: Runtime):
        expected = decode(runtime, make_sample(1))
        slot = runtime.start(make_sample(1))
        first, *rest = step_indices(4)
        runtime.step([slot], [first])
        decode(runtime, make_sample(2, WIDE))
        for index in rest:
            runtime.step([slot], [index])
        assert (pixels(runtime, slot) == expected).all()

    @pytest.mark.computes
    def test_each_step_can_be_previewed_without_changing_the_image(self, runtime: Runtime):
        expected = decode(runtime, make_sample(1, WIDE))
        slots = [runtime.start(make_sample(i, WIDE)) for i in range(2)]
        previews = []
        for index in step_indices(4):
            runtime.step(slots, [index] * 2)
            previews.append(runtime.preview(slots[1]))
        assert all(preview.shape == (*WIDE, 3) and preview.dtype == np.uint8 for preview in previews)
        image = pixels(runtime, slots[1]).astype(int)
        assert np.abs(image - expected).max() <= levels(runtime)
        assert np.abs(previews[-1] - image).max() <= 1  # after the last step, x0 is the image

    def test_slots_are_limited_and_reusable(self, runtime: Runtime):
        slots = [runtime.start(make_sample(i)) for i in range(runtime.info.slots)]
        with pytest.raises(DecodeError, match="slots"):
            runtime.start(make_sample())
        for slot in slots:
            runtime.release(slot)
        with pytest.raises(DecodeError, match="twice"):
            runtime.release(slots[0])
        decode(runtime, make_sample())

    def test_an_unsupported_size_is_rejected_without_using_a_slot(self, runtime: Runtime):
        for _ in range(runtime.info.slots + 1):
            with pytest.raises(DecodeError, match="96x96"):
                runtime.start(make_sample(size=Size(96, 96)))
        decode(runtime, make_sample())

    def test_images_that_wait_to_be_encoded_do_not_stop_the_device(self, runtime: Runtime):
        expected = decode(runtime, make_sample(1))
        finished = []
        for _ in range(2 * runtime.info.slots + 2):
            slot = runtime.start(make_sample(1))
            for index in step_indices(4):
                runtime.step([slot], [index])
            finished.append(runtime.finish(slot))
            runtime.release(slot)
        for rows in finished:
            rows.wait(SIZE.height)
            assert (rows.pixels == expected).all()
            rows.close()

    def test_rows_remain_valid_after_their_slot_is_released(self, runtime: Runtime):
        expected = decode(runtime, make_sample(1))
        slot = runtime.start(make_sample(1))
        for index in step_indices(4):
            runtime.step([slot], [index])
        rows = runtime.finish(slot)
        runtime.release(slot)
        decode(runtime, make_sample(2))
        rows.wait(SIZE.height)
        assert (rows.pixels == expected).all()
        rows.close()


class TestTiles:
    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    @pytest.mark.parametrize("size", [IN_TILES, Size(160, 64), Size(96, 96)])
    def test_a_latent_becomes_an_image_larger_than_all_sizes(self, tiled: Runtime, size: Size, steps: int):
        image = decode(tiled, make_sample(size=size), steps)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8

    def test_the_same_request_gives_the_same_image(self, tiled: Runtime):
        assert (decode(tiled, make_sample(1, IN_TILES)) == decode(tiled, make_sample(1, IN_TILES))).all()

    def test_other_images_between_two_tiles_change_nothing(self, tiled: Runtime):
        sizes = (IN_TILES, Size(96, 160), SIZE, SIZE)
        alone = [decode(tiled, make_sample(i, size)) for i, size in enumerate(sizes)]
        slots = [tiled.start(make_sample(i, size)) for i, size in enumerate(sizes)]
        calls = [index for index in step_indices(4) for _ in range(len(tiled.info.tiles(IN_TILES)))]
        others = [index for index in step_indices(4) for _ in range(len(tiled.info.tiles(sizes[1])))]
        whole = list(step_indices(4))
        for index in calls:
            tiled.step([slots[0]], [index])
            if others:
                tiled.step([slots[1]], [others.pop(0)])
            if whole:
                tiled.step(slots[2:], [whole.pop(0)] * 2)
        for slot, expected in zip(slots, alone, strict=True):
            assert np.abs(pixels(tiled, slot).astype(int) - expected).max() <= levels(tiled)

    @pytest.mark.computes
    def test_each_step_can_be_previewed_without_changing_the_image(self, tiled: Runtime):
        expected = decode(tiled, make_sample(1, IN_TILES))
        slot = tiled.start(make_sample(1, IN_TILES))
        previews = []
        for index in step_indices(4):
            step(tiled, slot, index, IN_TILES)
            previews.append(tiled.preview(slot))
        assert all(preview.shape == (*IN_TILES, 3) and preview.dtype == np.uint8 for preview in previews)
        assert (pixels(tiled, slot) == expected).all()
        assert np.abs(previews[-1].astype(int) - expected).max() <= 1

    def test_an_image_can_be_released_between_two_tiles(self, tiled: Runtime):
        expected = decode(tiled, make_sample(1, IN_TILES))
        for _ in range(tiled.info.slots + 1):
            slot = tiled.start(make_sample(2, IN_TILES))
            tiled.step([slot], [0])
            tiled.release(slot)
        assert (decode(tiled, make_sample(1, IN_TILES)) == expected).all()

    def test_each_slot_can_have_one(self, tiled: Runtime):
        slots = [tiled.start(make_sample(i, IN_TILES)) for i in range(tiled.info.slots)]
        with pytest.raises(DecodeError, match="slots"):
            tiled.start(make_sample(size=IN_TILES))
        for slot in slots:
            tiled.release(slot)
        decode(tiled, make_sample(size=IN_TILES))

    def test_nan_in_one_does_not_reach_other_images(self, tiled: Runtime):
        expected = decode(tiled, make_sample(2), 1)
        sample = make_sample(1, IN_TILES)
        slot = tiled.start(replace(sample, latent=torch.full_like(sample.latent, torch.nan)))
        step(tiled, slot, 0, IN_TILES)
        tiled.preview(slot)
        assert (decode(tiled, make_sample(2), 1) == expected).all()
        tiled.release(slot)

    def test_one_in_a_batch_is_rejected(self, tiled: Runtime):
        slots = [tiled.start(make_sample(i, IN_TILES)) for i in range(2)]
        with pytest.raises(DecodeError, match="batch"):
            tiled.step(slots, [0, 0])

    @pytest.mark.parametrize(
        "size", [Size(160, 160), Size(32, 160), Size(64, 112)], ids=["too large", "too small", "not a multiple"]
    )
    def test_other_sizes_are_rejected_without_using_a_slot(self, tiled: Runtime, size: Size):
        for _ in range(tiled.info.slots + 1):
            with pytest.raises(DecodeError, match=str(size)):
                tiled.start(make_sample(size=size))
        decode(tiled, make_sample(size=IN_TILES))

    def test_rows_remain_valid_after_their_slot_is_released(self, tiled: Runtime):
        expected = decode(tiled, make_sample(1, IN_TILES))
        finished = []
        for _ in range(tiled.info.slots + 2):  # more than there are buffers
            slot = tiled.start(make_sample(1, IN_TILES))
            for index in step_indices(4):
                step(tiled, slot, index, IN_TILES)
            finished.append(tiled.finish(slot))
            tiled.release(slot)
        for rows in finished:
            rows.wait(IN_TILES.height)
            assert (rows.pixels == expected).all()
            rows.close()
