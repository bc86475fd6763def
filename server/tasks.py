"""The images of a request as tasks: their inputs, seeds and output streams."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from engines.runtime.protocol import Sample
from engines.size import Size
from server.dispatch import DecodeTask
from server.images.encoding import Encoding
from server.metrics import CaptionSource
from server.request import DecodeOptions, DecodeRequest, explain_failure
from server.stream import ImageStream

KnownCaptions = Mapping[str, tuple[Tensor, CaptionSource]]  # by prompt: the embedding [T, E], and where it was found


def make_tasks(
    request: DecodeRequest, size: Size, encoding: Encoding, captions: KnownCaptions, model: str
) -> list[DecodeTask]:
    """Return a task for each image of `request`.

    Args:
        request: The request.
        size: Output size.
        encoding: Encoding of the images.
        captions: Captions of its prompts, as far as they are known.
        model: Name of the model, for the metadata.
    """
    return [_task(sample, request.options, encoding, model) for sample in _samples(request, size, captions)]


def _samples(request: DecodeRequest, size: Size, captions: KnownCaptions) -> Iterator[Sample]:
    """Yield the inputs of the images of `request`. Seeds count up from the request's, or from a random one."""
    options = request.options
    first_seed = secrets.randbits(53) if options.seed is None else options.seed  # 53 bits are exact in JavaScript
    for index, latent in enumerate(request.latents):
        caption = None if request.captions is None else request.captions[index]
        if request.prompts is not None and request.prompts[index] in captions:
            caption = captions[request.prompts[index]][0]
        yield Sample(latent, size, options.sigma, (first_seed + index) % 2**64, caption)


def _task(sample: Sample, options: DecodeOptions, encoding: Encoding, model: str) -> DecodeTask:
    stream = ImageStream(
        sample.seed,
        encoding.media_type,
        partial(explain_failure, sample),
        encoding.content_length(sample.size),
        encoding.shape(sample.size),
        encoding.dtype,
    )
    return DecodeTask(sample, stream, replace(encoding, text=_png_text(model, options, sample.seed)))


def _png_text(model: str, options: DecodeOptions, seed: int) -> dict[str, str]:
    if not options.metadata:
        return {}
    return {
        "Software": "pid-decode-server",
        "Decoder": model,
        "Seed": str(seed),
        "Sigma": f"{options.sigma:g}",
        "Steps": str(options.steps),
    }
