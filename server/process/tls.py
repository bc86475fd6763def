"""TLS: certificate, private key, and the authorities that sign client certificates."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import ConfigError


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a server, named by the flags --ssl-certfile, --ssl-keyfile and --ssl-ca-certs."""

    certificate: Path  # with the chain of intermediate certificates, and the key unless that is a separate file
    key: Path | None = None
    password: str | None = field(default=None, repr=False)  # of an encrypted key
    client_authorities: Path | None = None  # clients need a certificate that one of these signed


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the TLS context of a server: TLS 1.2 or newer, HTTP/1.1.

    Raises:
        ConfigError: A file cannot be read or used.
    """
    _check_readable("--ssl-certfile", files.certificate)
    if files.key is not None:
        _check_readable("--ssl-keyfile", files.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, files)
    if files.client_authorities is not None:
        _check_readable("--ssl-ca-certs", files.client_authorities)
        try:
            context.load_verify_locations(files.client_authorities)
        except ssl.SSLError:
            raise ConfigError(f"--ssl-ca-certs {files.client_authorities} has no certificates in PEM format.") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_certificate(context: ssl.SSLContext, files: TlsFiles) -> None:
    key, asked = files.key or files.certificate, False

    def password() -> str:  # without this function, OpenSSL would ask for a password on the terminal
        nonlocal asked
        asked = True
        return files.password or ""

    try:
        context.load_cert_chain(files.certificate, files.key, password)
    except (ssl.SSLError, ValueError) as error:  # ValueError: the password is too long
        if asked and files.password is None:
            reason = f"The private key in {key} is encrypted; set its password with --ssl-keyfile-password."
        elif asked:
            reason = f"The password is not that of the private key in {key}."
        elif getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            reason = f"The private key in {key} does not belong to the certificate in {files.certificate}."
        elif files.key is None:
            reason = f"{files.certificate} must have a certificate and, without --ssl-keyfile, its key in PEM format."
        else:
            reason = f"{files.certificate} and {key} must be a certificate and its private key in PEM format."
        raise ConfigError(reason) from None


def _check_readable(flag: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"Cannot read {flag} {path}: {error.strerror}.") from None
