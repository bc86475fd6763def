"""The page at / and its files, which are part of the package: modules and a style sheet that need no build step."""

from __future__ import annotations

import json
from importlib import resources

import torch
from starlette.responses import Response

from engines.bundled import dct
from engines.bundled.decoder import PHOTO
from server.http.static_files import StaticFiles, page_response

PATH = "/playground"

_PACKAGE = resources.files("server.http.playground")
_STATIC = _PACKAGE / "static"
_PAGE = "index.html"
_DIGITS = 7  # of the numbers in dct.json; latents are sent as float16


def playground_files() -> StaticFiles:
    """Return the files of the page, which are read now, so that requests do not touch the disk."""
    files = {file.name: file.read_bytes() for file in _STATIC.iterdir() if file.name != _PAGE}
    files |= {file.name: file.read_bytes() for file in (_PACKAGE / "photos").iterdir() if file.name.endswith(".jpg")}
    files["fig.jpg"] = PHOTO.read_bytes()
    files["dct.json"] = _dct()
    return StaticFiles(PATH, files)


def playground_page(files: StaticFiles) -> Response:
    """Return the page. Its links are relative, so that it also works below a prefix that a proxy removes."""
    html = (_STATIC / _PAGE).read_text("utf-8").replace("{files}", files.base)
    return page_response(html, {"Vary": "Accept"})


def _dct() -> bytes:
    """Return the latent space of the bundled decoder as JSON, so that the page has no second definition of it.

    `analysis` maps the pixels of a block to coefficients and `synthesis` back, both [CHANNELS, 3, BLOCK, BLOCK].
    """
    pixels = 3 * dct.BLOCK**2
    blocks = torch.eye(pixels, dtype=torch.float64).reshape(pixels, 3, dct.BLOCK, dct.BLOCK)
    coefficients = torch.eye(dct.CHANNELS, dtype=torch.float64)[:, :, None, None]
    analysis = dct.encode(blocks)[:, :, 0, 0].T.reshape(dct.CHANNELS, 3, dct.BLOCK, dct.BLOCK)
    matrices = {"analysis": analysis, "synthesis": dct.decode(coefficients)}
    document = {name: [round(x, _DIGITS) for x in matrix.flatten().tolist()] for name, matrix in matrices.items()}
    return json.dumps({"block": dct.BLOCK, "channels": dct.CHANNELS, **document}, separators=(",", ":")).encode()
