"""The page at /docs: Swagger UI, served from an installed package, so that the page loads nothing from other hosts."""

from __future__ import annotations

from html import escape
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engines.errors import ConfigError
from server.http.static_files import StaticFiles, page_response

PACKAGE = "fastapi_swagger.resources"  # of the distribution fastapi-swagger
PATH = "/docs"

_START_SCRIPT = """\
window.addEventListener("load", function () {
    const page = SwaggerUIBundle({
        url: "openapi.json",
        dom_id: "#page",
        deepLinking: true,
        displayRequestDuration: true,
        tryItOutEnabled: true,
        validatorUrl: null,
        onComplete: function () {
            // Swagger UI would prefer JSON to images.
            page.oas3Actions.setResponseContentType({ value: "image/png", path: "/decode", method: "post" });
        }
    });
});
"""
_FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")


def docs_routes(title: str) -> list[Route]:
    """Return the routes of the page and of its files, which are read now, so that requests do not touch the disk.

    Raises:
        ConfigError: the package with Swagger UI is missing, although it is among the server's dependencies.
    """
    files = StaticFiles(PATH, {**{name: _read(name) for name in _FILES}, "start.js": _START_SCRIPT.encode()})
    page = page_response(_page(title, files.base))

    async def docs(request: Request) -> Response:
        return page

    return [Route(PATH, docs), *files.routes()]


def _read(name: str) -> bytes:
    try:
        return resources.files(PACKAGE).joinpath(name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise ConfigError(
            "The package fastapi-swagger, which contains the page at /docs, is missing or incomplete; "
            "install it with: pip install fastapi-swagger"
        ) from None


def _page(title: str, files: str) -> str:
    """Return the HTML, which loads its files from the relative address `files`."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="{files}/favicon-32x32.png">
<link rel="stylesheet" href="{files}/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<noscript>This page needs JavaScript. The interface is also described in <a href="openapi.json">openapi.json</a>.
</noscript>
<script src="{files}/swagger-ui-bundle.js"></script>
<script src="{files}/start.js"></script>
</body>
</html>
"""
