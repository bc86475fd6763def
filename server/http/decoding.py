"""The one way of decode requests to the scheduler, whatever their protocol."""

from __future__ import annotations

from fastapi import Request, Response

from server.http.auth import fair_share_client
from server.http.context import RequestContext
from server.http.protocols.base import DecodeProtocol
from server.http.responses import DecodeResponse
from server.service import DecodeService


async def serve_decode(protocol: DecodeProtocol, request: Request) -> Response:
    """Read a decode request, admit it, and return the response that streams its images.

    Raises:
        PidError: the request is rejected.
    """
    service: DecodeService = request.app.state.service
    context: RequestContext = request.state.context
    head = protocol.read_head(request.headers.items(), request.query_params.multi_items(), service.decoder_limits)
    client = fair_share_client(request.scope, service.settings.fair_by)
    service.check(head.options, head.is_final, client)
    parsed = await service.bodies.read(request.stream(), head.content_length, head.parse)
    captions = await service.find_captions(parsed.decode)
    admission = service.submit(parsed.decode, parsed.format, client, captions)
    return DecodeResponse(admission, parsed.layout, context, service.metrics)
