"""docker/sbom.sh on a small root file system, and on an image made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

import engines
from tests.programs import run

DEBIAN = """\
Package: zlib1g
Status: install ok installed
Architecture: amd64
Source: zlib
Version: 1:1.2.13.dfsg-1
Description: compression library

"""
METADATA = "Metadata-Version: 2.1\nName: safetensors\nVersion: 0.8.0\nLicense: Apache-2.0\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Root file system with one Debian package, one Python package, and one that is only declared."""
    root = tmp_path / "root"
    for name, text in {
        "etc/os-release": 'ID=debian\nVERSION_ID="12"\n',
        "var/lib/dpkg/status": DEBIAN,
        "opt/venv/lib/python3.11/site-packages/safetensors-0.8.0.dist-info/METADATA": METADATA,
        "app/requirements.txt": "tensorrt-cu13==1.0\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def archive(root: Path, tmp_path: Path) -> Path:
    """OCI archive of an image with this root file system."""
    store = ["--storage-driver", "vfs", "--root", tmp_path / "store", "--runroot", tmp_path / "run"]
    container = run("buildah", *store, "from", "scratch").strip()
    run("buildah", *store, "copy", "--quiet", container, root, "/")
    run("buildah", *store, "commit", "--quiet", container, "small")
    run("buildah", *store, "push", "--quiet", "small", f"oci-archive:{tmp_path / 'small.tar'}")
    return tmp_path / "small.tar"


@pytest.mark.operate
@pytest.mark.parametrize("kind", ["dir", "oci-archive"])
def test_the_sbom_is_valid_and_has_the_installed_packages(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    from tests.operations.sbom import make_sbom, packages  # its packages are installed by make test-operations

    source = request.getfixturevalue("root" if kind == "dir" else "archive")
    sbom = make_sbom(f"{kind}:{source}", tmp_path / "sbom.json")
    assert packages(sbom, "deb") == {"zlib1g": "1:1.2.13.dfsg-1"}
    assert packages(sbom, "pypi") == {"safetensors": "0.8.0"}
    described = sbom["metadata"]["component"]
    assert (described["name"], described["version"]) == ("pid-decode-server", engines.__version__)
