"""Static files of a page, which browsers may keep because their addresses contain a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MEDIA_TYPES = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
# Style sheets have images as data: URLs, and scripts show the images of responses as blobs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_UNCHANGED = "public, max-age=31536000, immutable"


class StaticFiles:
    """Files that are served from memory at `PREFIX/VERSION/NAME`.

    The version is a hash of all files. As it is part of the path, a module that imports another one by a relative path
    gets the one of the same version. During an update, a page may come from another server than its files: other
    versions get the current files as well, but must not be cached.
    """

    def __init__(self, prefix: str, files: Mapping[str, bytes]) -> None:
        """Serve `files`, contents by name, below the path `prefix`, which begins with a slash.

        Raises:
            KeyError: `MEDIA_TYPES` lacks the suffix of a file.
        """
        self._prefix, self._files = prefix, files
        self._types = {name: MEDIA_TYPES[PurePosixPath(name).suffix] for name in files}
        content = hashlib.sha256()
        for name, data in sorted(files.items()):
            content.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(data).digest())
        self._version = content.hexdigest()[:16]

    @property
    def base(self) -> str:
        """Address of the files, relative to a page next to `prefix`, so that it works below a prefix of a proxy."""
        return f"{self._prefix.removeprefix('/')}/{self._version}"

    def routes(self) -> list[Route]:
        """Return one route per file."""
        return [
            Route(f"{self._prefix}/{{version}}/{name}", partial(self._serve, name), name=name) for name in self._files
        ]

    async def _serve(self, name: str, request: Request) -> Response:
        current = request.path_params["version"] == self._version
        headers = {**_HEADERS, "Cache-Control": _UNCHANGED if current else "no-cache"}
        return Response(self._files[name], headers=headers, media_type=self._types[name])


def page_response(html: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a page that may load files and data from this server only, and no inline scripts or styles."""
    policy = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return Response(html, headers={**_HEADERS, **policy, **(headers or {})}, media_type="text/html")
