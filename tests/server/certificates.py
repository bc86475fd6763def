"""Certificates for tests of TLS, made by the program openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """Paths of a certificate and its private key, in PEM format."""

    certificate: Path
    key: Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)  # noqa: S607


def make_certificate(folder: Path, name: str = "localhost") -> Certificate:
    """Make a certificate for `name` and 127.0.0.1, signed by itself."""
    made = Certificate(folder / f"{name}.crt", folder / f"{name}.key")
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
    openssl("req", *options, *subject, "-keyout", made.key, "-out", made.certificate)
    return made


def encrypt(key: Path, password: str) -> Path:
    """Write a copy of a private key that is encrypted with `password`; return its path."""
    encrypted = key.with_suffix(".encrypted")
    openssl("pkey", "-aes256", "-in", key, "-passout", f"pass:{password}", "-out", encrypted)
    return encrypted
