"""The page at / and its files. tests/clients/playground opens the page in a browser."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
import torch

from engines.bundled import dct
from engines.bundled.decoder import PHOTO
from server.http.static_files import MEDIA_TYPES
from tests.server.conftest import Running, Serve

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
STATIC = Path(str(resources.files("server.http.playground") / "static"))
SIZE_BUDGET = 150 * 1024  # bytes of the page without photos
KEY = "alice-0123456789abcdef"


def page(server: Running) -> str:
    return server.client.get("/", headers={"Accept": BROWSER}).text


def links(html: str) -> list[str]:
    """Return the addresses of files that the page loads."""
    return [link for link in re.findall(r'(?:href|src)="([^"]+)"', html) if link.startswith("playground/")]


def base(server: Running) -> str:
    """Return the path of the files, which ends with their version."""
    (folder,) = {link.rpartition("/")[0] for link in links(page(server))}
    return f"/{folder}"


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (BROWSER, "text/html"),
        ("text/html", "text/html"),
        ("application/json;q=0.5, text/html", "text/html"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/html;q=0.5, application/json", "application/json"),
        ("image/png", "application/json"),
        ("", "application/json"),
    ],
)
def test_the_root_is_the_page_only_for_clients_that_prefer_html(server: Running, accept: str, media_type: str):
    response = server.client.get("/", headers={"Accept": accept})
    assert response.headers["content-type"].partition(";")[0] == media_type
    assert response.headers["vary"] == "Accept"


def test_the_policy_of_the_page_forbids_other_hosts_and_inline_code(server: Running):
    response = server.client.get("/", headers={"Accept": BROWSER})
    policy = dict(part.split(maxsplit=1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"https?:|\*|unsafe", " ".join(policy.values()))
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=|javascript:", response.text)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_every_link_of_the_page_is_relative_and_exists(server: Running):
    html = page(server)
    assert {"style.css", "app.js", "cat.jpg"} <= {link.rpartition("/")[2] for link in links(html)}
    for link in re.findall(r'(?:href|src)="([^"]+)"', html):
        assert not re.match(r"\w+:|/", link), link
        assert server.client.get(urljoin("/", link)).status_code == 200, link


def test_every_import_of_a_module_exists():
    for module in STATIC.glob("*.js"):
        for name in re.findall(r'(?:from|import\() ?"([^"]+)"', module.read_text()):
            assert name.startswith("./"), module.name
            assert (STATIC / name).exists(), f"{module.name}: {name}"


def test_no_file_loads_anything_from_another_host():
    allowed = {"http://www.w3.org/2000/svg"}  # names a format; browsers do not load it
    for file in STATIC.iterdir():
        code = re.sub(r"^\s*(?://|/?\*).*", "", file.read_text(), flags=re.MULTILINE)  # comments may have links
        assert set(re.findall(r"""(?:https?:)?//[\w-]+\.[^\s"'`)]+""", code)) <= allowed, file.name


@pytest.mark.parametrize("name", ["app.js", "style.css", "icon.svg", "dct.json", "cat.jpg"])
def test_a_file_may_be_cached_for_as_long_as_its_address_has_the_version(server: Running, name: str):
    current, other = server.client.get(f"{base(server)}/{name}"), server.client.get(f"/playground/0/{name}")
    assert current.content == other.content
    assert current.headers["content-type"].partition(";")[0] == MEDIA_TYPES[Path(name).suffix]
    assert current.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in current.headers["cache-control"]
    assert other.headers["cache-control"] == "no-cache"


def test_other_files_of_the_package_are_not_served(server: Running):
    for name in ("index.html", "page.py", "../page.py", "cat.txt"):
        assert server.client.get(f"{base(server)}/{name}").status_code == 404, name


def test_the_page_without_photos_is_small(server: Running):
    matrices = server.client.get(f"{base(server)}/dct.json").content
    assert sum(file.stat().st_size for file in STATIC.iterdir()) + len(matrices) < SIZE_BUDGET


def test_every_file_is_part_of_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["server.http.playground"]
    package = STATIC.parent
    included = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for folder in ("static", "photos") for path in (package / folder).rglob("*")} == included


def test_every_photo_has_a_note_with_its_licence(server: Running):
    photos = {Path(link).name for link in links(page(server)) if link.endswith(".jpg")}
    assert len(photos) == 3
    notes = [*(STATIC.parent / "photos").glob("*.txt"), PHOTO.with_suffix(".txt")]
    licensed = [
        note.read_text().partition(":")[0] for note in notes if "https://creativecommons.org/" in note.read_text()
    ]
    assert {PHOTO.name if name == "fig.jpg" else name for name in photos} == set(licensed)


def test_the_matrices_for_the_browser_are_those_of_the_latent_space(server: Running):
    document = server.client.get(f"{base(server)}/dct.json").json()
    shape = (dct.CHANNELS, 3, document["block"], document["block"])
    analysis, synthesis = (np.reshape(document[name], shape) for name in ("analysis", "synthesis"))
    image = torch.rand(1, 3, 4 * dct.BLOCK, 6 * dct.BLOCK, dtype=torch.float64) * 2 - 1
    blocks = image[0].reshape(3, 4, dct.BLOCK, 6, dct.BLOCK).numpy()
    latent = np.einsum("cpvu,pyvxu->cyx", analysis, blocks)
    np.testing.assert_allclose(latent, dct.encode(image)[0], atol=1e-5)
    pixels = np.einsum("cpvu,cyx->pyvxu", synthesis, latent).reshape(image.shape[1:])
    np.testing.assert_allclose(pixels, dct.decode(torch.from_numpy(latent)[None])[0], atol=1e-5)


def test_the_page_can_be_turned_off(serve: Serve):
    with serve(playground=False) as running:
        response = running.client.get("/", headers={"Accept": BROWSER})
        assert response.json()["name"] == "PiD decode server"
        assert "vary" not in response.headers
        assert running.client.get("/playground/0/app.js").status_code == 404


def test_the_page_and_its_files_need_no_api_key(serve: Serve, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text(f"alice: {KEY}\n")
    with serve(api_keys=keys) as running:
        for link in links(page(running)):
            assert running.client.get(f"/{link}").status_code == 200, link
        assert running.client.get("/info").status_code == 401
        authorised = running.client.get("/info", headers={"Authorization": f"Bearer {KEY}"})
        assert json.loads(authorised.text)["decoders"][0]["name"] == "simulated"
