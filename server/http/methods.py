"""HEAD and OPTIONS for every path, derived from its other methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")  # that a route may have
_WHOLE_SERVER = "*"  # target of `OPTIONS *`


def allowed_methods(routes: Sequence[BaseRoute], scope: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the methods of the path of a request, with HEAD and OPTIONS; empty if there is no such path."""
    # Looking for a route writes to the scope.
    copy = {"type": "http", "path": scope["path"], "root_path": scope.get("root_path", ""), "headers": scope["headers"]}
    found = {
        method
        for method in _METHODS
        if any(route.matches({**copy, "method": method})[0] is Match.FULL for route in routes)
    }
    if "GET" in found:
        found.add("HEAD")
    return tuple(sorted({*found, "OPTIONS"})) if found else ()


class MethodsMiddleware:
    """ASGI middleware that serves HEAD like GET, without its body, and responds to OPTIONS with the methods of a path.

    The connection does not send the body of a response to HEAD. Put this middleware next to the routes, so that access
    is checked before it.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        """Wrap `app`, which has these routes."""
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to OPTIONS, and pass other requests on."""
        app, method = self._app, scope.get("method")
        if method == "OPTIONS" and scope["path"] == _WHOLE_SERVER:
            app = Response(status_code=204)
        elif method in ("HEAD", "OPTIONS"):
            allowed = allowed_methods(self._routes, scope)
            if allowed and method == "OPTIONS":
                app = Response(status_code=204, headers={"Allow": ", ".join(allowed)})
            elif "HEAD" in allowed:
                scope = {**scope, "method": "GET"}
        await app(scope, receive, send)
