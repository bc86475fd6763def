"""Contract tests that run on every runtime."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import DecodeError
from engines.pid.sampler import step_indices
from engines.runtime.protocol import Runtime
from engines.size import Size
from tests.engines.runtime.runtimes import SIZE, WIDE, decode, levels, make_sample, pixels


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
