"""Responses with previews: after each step a small JPEG, then the image. For one image and for batches."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass

from server.body.negotiation import EVENTS, REPLACE
from server.http.containers import (
    BASE64_EXPANSION,
    Finished,
    Part,
    finished,
    image_description,
    image_part,
    json_with_data,
    multipart_body,
)
from server.http.layouts import Begun, Extra, Layout, Streams, seeds, timing
from server.images.encoding import PREVIEW_ENCODING
from server.stream import ImageStream, Preview

# Previews are useless once they are stale, so neither caches nor proxies may hold them back.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class PreviewEvent:
    """A preview of an image."""

    index: int
    stream: ImageStream
    preview: Preview


Event = PreviewEvent | Finished


class PreviewLayout(Layout):
    """Layout with the previews of each image, as far as the client reads them in time, and then the image.

    The response begins with the first preview. If the only image of a request fails before, the response is its error.
    """

    has_previews = True
    media_type: str

    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Wait for the first preview or image."""
        events = _events(streams, request_id)
        first = await anext(events)
        if isinstance(first, Finished) and len(streams) == 1 and first.stream.error is not None:
            raise first.stream.error
        headers = {"Content-Type": self.media_type, "X-Seed": seeds(streams), **_HEADERS}
        return Begun(headers, self._body(_chain(first, events)))

    @abstractmethod
    def _body(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the body in chunks."""


class EventStream(PreviewLayout):
    """Server-sent events named `preview`, `image` and `problem`, with data in JSON (WHATWG HTML, 9.2)."""

    media_type = EVENTS
    expansion = BASE64_EXPANSION

    async def _body(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        async for event in events:
            if isinstance(event, PreviewEvent):
                content = b"".join(json_with_data(_describe(event), [event.preview.jpeg]))
                yield Extra(b"event: preview\ndata: " + content + b"\n\n")
            elif event.problem is not None:
                document = json.dumps({"index": event.index, "problem": event.problem.document})
                yield f"event: problem\ndata: {document}\n\n".encode()
            else:
                members = image_description(event)
                members |= {"latency_ms": _latency_ms(event.stream), "server_timing": timing(event.stream)}
                yield b"event: image\ndata: "
                for piece in json_with_data(members, event.content):
                    yield piece
                yield b"\n\n"


class MixedReplace(PreviewLayout):
    """A multipart/x-mixed-replace body, in which browsers replace each part by the next one."""

    def __init__(self) -> None:
        """Choose a boundary."""
        self._boundary = secrets.token_hex(16)
        self.media_type = f"{REPLACE}; boundary={self._boundary}"

    def _body(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        return multipart_body(self._boundary, (_part(event) async for event in events))


def _describe(event: PreviewEvent) -> dict[str, object]:
    preview = event.preview
    return {
        "index": event.index,
        "step": preview.step,
        "steps": preview.steps,
        "latency_ms": _latency_ms(event.stream),
        "width": preview.size.width,
        "height": preview.size.height,
        "media_type": PREVIEW_ENCODING.media_type,
    }


def _part(event: Event) -> Part:
    latency = {"X-Latency-Ms": str(_latency_ms(event.stream))}
    if isinstance(event, Finished):
        part = image_part(event)
        return Part(part.headers | latency, part.content)
    headers = {
        "Content-Type": PREVIEW_ENCODING.media_type,
        "X-Step": str(event.preview.step),
        "X-Steps": str(event.preview.steps),
        "X-Index": str(event.index),
    }
    return Part(headers | latency, [Extra(event.preview.jpeg)])


def _latency_ms(stream: ImageStream) -> float:
    """Return the milliseconds since the request was accepted."""
    return round(1000 * (time.monotonic() - stream.created), 1)


async def _events(streams: Streams, request_id: str) -> AsyncIterator[Event]:
    """Yield the previews and images as they arrive; while the consumer is busy, newer previews replace older ones."""
    news = asyncio.Event()
    for stream in streams:
        stream.news = news
    pending = dict(enumerate(streams))
    while pending:
        news.clear()
        idle = True
        for index, stream in tuple(pending.items()):
            if stream.arrived:
                del pending[index]
                idle = False
                yield await finished(index, stream, request_id)
            elif (preview := stream.take_preview()) is not None:
                idle = False
                yield PreviewEvent(index, stream, preview)
        if idle:
            await news.wait()


async def _chain(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for event in rest:
        yield event
