"""The page at /docs: Swagger UI, served from an installed package, so that the page loads nothing from other hosts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engines.errors import ConfigError

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
_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}

# The style sheet of Swagger UI has images as data: URLs, and it shows the images of responses as blobs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_UNCHANGED = "public, max-age=31536000, immutable"  # for an address that has the hash of its content


@dataclass(frozen=True)
class _Asset:
    content: bytes
    media_type: str
    version: str  # hash of the content


def docs_routes(title: str) -> list[Route]:
    """Return the routes of the page and of its files, which are read now, so that requests do not touch the disk.

    Raises:
        ConfigError: the package with Swagger UI is missing, although it is among the server's dependencies.
    """
    assets = {name: _asset(name, media_type) for name, media_type in _FILES.items()}
    page = _page(title, {name: asset.version for name, asset in assets.items()})

    async def docs(request: Request) -> Response:
        headers = {**_HEADERS, "Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return Response(page, headers=headers, media_type="text/html")

    async def docs_file(request: Request) -> Response:
        asset = assets[request.url.path.rpartition("/")[2]]
        cached = request.query_params.get("v") == asset.version  # during an update, the page may be of another server
        headers = {**_HEADERS, "Cache-Control": _UNCHANGED if cached else "no-cache"}
        return Response(asset.content, headers=headers, media_type=asset.media_type)

    return [Route(PATH, docs), *(Route(f"{PATH}/{name}", docs_file) for name in assets)]


def _asset(name: str, media_type: str) -> _Asset:
    try:
        content = _START_SCRIPT.encode() if name == "start.js" else resources.files(PACKAGE).joinpath(name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise ConfigError(
            "The package fastapi-swagger, which contains the page at /docs, is missing or incomplete; "
            "install it with: pip install fastapi-swagger"
        ) from None
    return _Asset(content, media_type, hashlib.sha256(content).hexdigest()[:16])


def _page(title: str, versions: Mapping[str, str]) -> str:
    """Return the HTML. Its links are relative, so that it also works below a prefix that a proxy removes."""
    links = {name: f"docs/{name}?v={version}" for name, version in versions.items()}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="{links["favicon-32x32.png"]}">
<link rel="stylesheet" href="{links["swagger-ui.css"]}">
</head>
<body>
<div id="page"></div>
<noscript>This page needs JavaScript. The interface is also described in <a href="openapi.json">openapi.json</a>.
</noscript>
<script src="{links["swagger-ui-bundle.js"]}"></script>
<script src="{links["start.js"]}"></script>
</body>
</html>
"""
