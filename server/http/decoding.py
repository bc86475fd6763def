"""The one way of decode requests to the scheduler, whatever their protocol."""

from __future__ import annotations

from fastapi import Request, Response

from server.body.selection import unknown_decoder
from server.errors import InvalidOptionError, UnknownDecoderError
from server.http.auth import fair_share_client
from server.http.context import RequestContext
from server.http.protocols.base import DecodeProtocol
from server.http.responses import DecodeResponse
from server.request import DecodeOptions
from server.service import DecodeService


async def serve_decode(protocol: DecodeProtocol, request: Request) -> Response:
    """Read a decode request, admit it, and return the response that streams its images.

    Raises:
        PidError: the request is rejected.
    """
    service: DecodeService = request.app.state.service
    context: RequestContext = request.state.context
    query = request.query_params.multi_items()
    if (decoder := request.path_params.get(protocol.decoder_parameter)) is not None:
        if decoder not in service.limits.decoders:
            raise UnknownDecoderError(unknown_decoder(decoder, service.limits))
        query.append(("decoder", decoder))
    head = protocol.read_head(request.headers.items(), query, service.limits)
    _check_previews(protocol, head.options)
    client = fair_share_client(request.scope, service.settings.fair_by)
    service.check(head.options, head.is_final, client)
    parsed = await service.bodies.read(request.stream(), head.content_length, head.parse)
    _check_previews(protocol, parsed.decode.options)
    context.fields["decoder"] = parsed.decode.decoder
    captions = await service.find_captions(parsed.decode)
    admission = service.submit(parsed.decode, parsed.format, client, captions, parsed.layout.has_previews)
    return DecodeResponse(admission, parsed.layout, context, service.metrics)


def _check_previews(protocol: DecodeProtocol, options: DecodeOptions) -> None:
    if options.preview == "steps" and not protocol.has_previews:
        raise InvalidOptionError("Previews are sent by POST /decode only; leave out the option preview.")
