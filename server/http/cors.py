"""Cross-origin requests (CORS): web pages of other origins may call the server from a browser."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

_METHODS = ("GET", "HEAD", "OPTIONS", "POST")
# Headers of responses that scripts may read: all of them. The names are for browsers that do not know `*` here.
_EXPOSED = ("Retry-After", "Server-Timing", "X-Request-Id", "X-Seed", "*")
_PREFLIGHT_SECONDS = 600  # for which a browser may reuse the response to a preflight


class CorsMiddleware(CORSMiddleware):
    """ASGI middleware that adds CORS headers to every response, errors included, and responds to preflights.

    Put it before all other middleware: browsers send no API key with a preflight, and a script can only read the
    status of an error that has these headers. Cookies play no part, as the server has none.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        """Wrap `app`; `origins` are those of the pages that may call it, or only `*`."""
        super().__init__(app, origins, _METHODS, ("*",), expose_headers=_EXPOSED, max_age=_PREFLIGHT_SECONDS)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return a 204 that lists what is allowed; a browser whose request is not among it reports the reason."""
        headers = super().preflight_response(request_headers).headers
        return Response(
            status_code=204,
            headers={name: headers[name] for name in headers if name.startswith("access-control-") or name == "vary"},
        )
