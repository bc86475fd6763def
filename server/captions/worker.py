"""The thread of the text encoder: it encodes the prompts that admitted images wait for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from engines.captions.protocol import TextEncoder
from engines.errors import DecodeError, DeviceMemoryError, PidError
from server.captions.cache import CaptionCache
from server.device_thread import DeviceThread, ThreadContext
from server.warm_up import measure_undisturbed

log = logging.getLogger(__name__)


class CaptionWorker(DeviceThread):
    """Thread that runs the text encoder.

    DecodeError and DeviceMemoryError fail only the images that wait for the prompts concerned.
    """

    def __init__(self, encoder: TextEncoder, cache: CaptionCache, context: ThreadContext) -> None:
        """Create the thread of `encoder`, whose results are stored in `cache`."""
        super().__init__("the text encoder", encoder, context)
        self._encoder, self._cache = encoder, cache

    def _serve(self) -> None:
        while (prompts := self._dispatcher.next_prompts()) is not None:
            # A request may have found a prompt missing just before the cache got it.
            known = {prompt: caption for prompt in prompts if (caption := self._cache.get(prompt)) is not None}
            self._dispatcher.add_captions(known)
            self._encode([prompt for prompt in prompts if prompt not in known])

    def _encode(self, prompts: Sequence[str]) -> None:
        if not prompts:
            return
        began = self._clock()
        try:
            captions = dict(zip(prompts, self._encoder.encode(prompts), strict=True))
        except (DecodeError, DeviceMemoryError) as error:
            self._encode_one_by_one(prompts, error)
            return
        seconds = self._clock() - began
        self._dispatcher.observe("caption", None, seconds, len(prompts))
        self._metrics.encoded_prompts(len(prompts), seconds)
        for prompt, caption in captions.items():
            self._cache.put(prompt, caption)
        self._dispatcher.add_captions(captions)

    def _encode_one_by_one(self, prompts: Sequence[str], error: PidError) -> None:
        """Retry prompts that failed together, so that only the ones that cause the error fail."""
        if len(prompts) == 1:
            self._dispatcher.fail_prompts(prompts, error)
            return
        log.warning("a batch of %d prompts failed; encoding them one by one: %s", len(prompts), error)
        for prompt in prompts:
            self._encode([prompt])

    def _warm_up(self) -> None:
        """Measure the cost of every batch size, after one encoding that includes one-time work.

        It encodes the empty prompt, which is a common one.
        """
        began, info = self._clock(), self._encoder.info
        self._cache.put("", self._encoder.encode([""])[0])
        for batch in range(1, info.max_batch + 1):
            measure_undisturbed(self._dispatcher, self._clock, partial(self._measure, batch))
        log.info("%s on %s: warm-up took %.1f s", info.name, info.device, self._clock() - began)

    def _measure(self, batch: int) -> None:
        """Measure the cost of one batch."""
        began = self._clock()
        self._encoder.encode([f"{number}" for number in range(batch)])
        self._dispatcher.measure("caption", None, self._clock() - began, batch)
