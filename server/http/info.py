"""The document of GET /info."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from server.decoders import Decoder
from server.http import models
from server.http.models import (
    CaptionShape,
    Info,
    KernelChoice,
    KernelTime,
    LatentSpace,
    MemoryPart,
    RequestLimits,
    StageCost,
    SupportedSize,
    TextEncoder,
)
from server.images.available import available_formats
from server.service import DecodeService

if TYPE_CHECKING:
    from engines.runtime.kernels.choice import Choice
    from engines.runtime.memory_plan import MemoryItem


def describe(service: DecodeService, memory: Sequence[tuple[str, MemoryItem]]) -> Info:
    """Return the decoders, their sizes and memory, the limits of the server and the measured cost of each stage.

    Args:
        service: The service.
        memory: Parts of the memory of each device.
    """
    return Info(
        decoders=[_decoder(decoder) for decoder in service.decoders.values()],
        text_encoder=_text_encoder(service),
        image_formats=list(available_formats()),
        devices=len(service.devices),
        resident=service.decoders.resident,
        memory=[
            MemoryPart(device=device, part=item.part, decoder=item.decoder, bytes=item.nbytes)
            for device, item in memory
        ],
        limits=_limits(service),
        costs=[
            StageCost(
                stage=key.stage,
                decoder=None if key.loaded is None else key.loaded.decoder,
                size=None if key.output is None else list(key.output.size),
                tile=None if key.output is None or key.output.tiling is None else list(key.output.tiling.tile),
                batch=key.batch,
                encoding=key.encoding,
                seconds=round(seconds, 6),
            )
            for key, seconds in service.current_costs().items()
        ],
    )


def _decoder(decoder: Decoder) -> models.Decoder:
    info = decoder.info
    return models.Decoder(
        name=decoder.name,
        model=info.decoder,
        latent_space=LatentSpace(
            name=info.latent_space,
            channels=info.latent_channels,
            pixels_per_cell=info.pixels_per_cell,
            sigma_frame=info.sigma_frame,
        ),
        upscale=info.upscale,
        sizes=[SupportedSize(output=list(size), latent=list(info.latent_size(size))) for size in decoder.sizes],
        max_pixels=info.max_pixels,
        caption=CaptionShape(tokens=info.caption_tokens, width=info.caption_width),
        images_per_step=info.max_batch,
        precision=info.precision,
        runtime=info.kind,
        device=info.device,
        notes=list(info.notes),
        kernels=[_kernel_choice(choice) for x in list(decoder.runtimes.values())[:1] for choice in x.kernel_choices()],
    )


def _kernel_choice(choice: Choice) -> KernelChoice:
    def time(name: str) -> KernelTime:
        result = choice.measured.get(name)
        if result is None:
            return KernelTime(name=name, seconds=None, error=None)
        return KernelTime(name=name, seconds=result.seconds, error=result.error if isfinite(result.error) else None)

    return KernelChoice(
        operation=choice.name,
        shape=choice.shape,
        chosen=choice.chosen,
        measured=[time(name) for name in choice.results],
    )


def _limits(service: DecodeService) -> RequestLimits:
    settings = service.settings
    return RequestLimits(
        images_per_request=settings.max_images,
        body_bytes=service.limits.max_body_bytes,
        pending_bytes=settings.pending_bytes,
        queue_images=settings.queue_images,
        queue_seconds=settings.queue_seconds,
        interactive_share=settings.interactive_share,
        standard_share=settings.standard_share,
        batch_share=settings.batch_share,
        deadline_seconds=settings.deadline,
        max_deadline_seconds=settings.max_deadline,
    )


def _text_encoder(service: DecodeService) -> TextEncoder | None:
    """Return the text encoder that encodes prompts, and the limits of its cache."""
    encoder, settings = service.text_encoder, service.settings
    if encoder is None:
        return None
    return TextEncoder(
        name=encoder.name,
        device=encoder.device,
        identity=encoder.identity,
        prefix_tokens=encoder.prefix_tokens,
        prompts_per_batch=encoder.max_batch,
        cache_bytes=settings.caption_cache_bytes,
        disk_cache_bytes=None if settings.caption_cache is None else settings.caption_disk_bytes,
    )
