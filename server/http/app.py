"""The ASGI application around a decode service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engines import __version__
from engines.errors import PidError
from server.http import about
from server.http.auth import ApiKeyMiddleware, KeyFile, is_public
from server.http.connections import ConnectionLimitMiddleware
from server.http.context import RequestContextMiddleware, error_response, problem_response
from server.http.cors import CorsMiddleware
from server.http.decoding import serve_decode
from server.http.docs_page import docs_routes
from server.http.methods import MethodsMiddleware, allowed_methods
from server.http.openapi_document import DESCRIPTION, complete_document
from server.http.playground.page import playground_files, playground_page
from server.http.problem import Problem, problem_document
from server.http.protocols.base import DecodeProtocol
from server.http.protocols.decode import Decode
from server.http.protocols.kserve import KServe
from server.http.protocols.remote_decode import RemoteDecode
from server.http.routes import router
from server.http.trace_setup import find_tracer_provider
from server.service import DecodeService
from server.service_gauges import add_service_gauges
from server.swaps import Swaps

log = logging.getLogger(__name__)

PROTOCOLS: tuple[DecodeProtocol, ...] = (Decode(), RemoteDecode(), KServe())


def create_app(service: DecodeService, swaps: Swaps | None = None) -> FastAPI:
    """Create the application, whose lifespan starts and stops `service` and `swaps`.

    Raises:
        ConfigError: the API key file is invalid, or OpenTelemetry is missing although --traces is set.
    """
    settings, provider = service.settings, find_tracer_provider(service.settings.traces)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        if swaps is not None:
            swaps.start(asyncio.get_running_loop())
        yield
        if swaps is not None:
            swaps.stop()
        service.stop()
        if provider is not None:
            provider.shutdown()  # exports the remaining spans

    app = FastAPI(
        title=about.NAME,
        **DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service, app.state.swaps = service, swaps
    add_service_gauges(service)
    for protocol in PROTOCOLS:
        app.include_router(protocol.router(partial(serve_decode, protocol)))
    app.include_router(router)
    app.include_router(about.router)
    app.routes.extend(docs_routes(about.NAME))
    app.state.playground = None
    if settings.playground:
        files = playground_files()
        app.state.playground = playground_page(files)
        app.routes.extend(files.routes())
    # The middleware added last sees a request first.
    app.add_middleware(MethodsMiddleware, routes=app.routes)
    if settings.api_keys is not None:
        keys = KeyFile(settings.api_keys)
        app.add_middleware(
            ApiKeyMiddleware,
            keys=keys,
            max_in_flight=settings.max_in_flight_per_key,
            metrics=service.metrics,
            next_end=service.undelivered.next_end,
        )
    app.add_middleware(ConnectionLimitMiddleware, metrics=service.metrics)
    if provider is not None:
        from server.http.tracing import TracingMiddleware  # imports OpenTelemetry, an optional package

        app.add_middleware(TracingMiddleware, provider=provider)
    app.add_middleware(
        RequestContextMiddleware,
        metrics=service.metrics,
        protocols=PROTOCOLS,
        out_of_memory=service.out_of_memory,
    )
    if settings.cors_origins is not None:
        app.add_middleware(CorsMiddleware, origins=settings.cors_origins)
    app.add_exception_handler(PidError, _problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    decoders = service.limits.decoders
    first = next(iter(decoders.values()))
    example = first.channels, *min(first.latent_sizes)
    complete_document(app.openapi(), decoders, example, is_public, requires_keys=settings.api_keys is not None)
    return app


async def _problem(request: Request, error: Exception) -> Response:
    return error_response(error, request.state.context, request.app.state.service.metrics)


async def _http_problem(request: Request, error: Exception) -> Response:
    """Turn Starlette's errors (unknown path, wrong method) into problem documents."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this class only
    detail = f"No route for {request.method} {request.url.path[:80]}; see /docs."
    document = problem_document(error.status_code, "no-such-route", detail, request.state.context.request_id)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(allowed_methods(request.app.routes, request.scope))
    return problem_response(Problem(error.status_code, headers, document), request.state.context)


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # never received by the client
