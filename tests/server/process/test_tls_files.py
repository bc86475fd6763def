"""Certificates and keys: what can be wrong with them is one sentence."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from server.process.tls import TlsFiles, server_context
from tests.server.certificates import Certificate, encrypt, make_certificate
from tests.server.process.config_errors import message_of

PASSWORD = "correct horse"  # noqa: S105


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("own"))


def message(files: TlsFiles) -> str:
    return message_of(lambda: server_context(files))


def test_certificate_and_key_may_be_in_one_file(own: Certificate, tmp_path: Path):
    both = tmp_path / "both.pem"
    both.write_bytes(own.certificate.read_bytes() + own.key.read_bytes())
    assert server_context(TlsFiles(both)).minimum_version is ssl.TLSVersion.TLSv1_2
    assert "without --ssl-keyfile" in message(TlsFiles(own.certificate))


def test_clients_need_a_certificate_only_if_authorities_are_set(own: Certificate):
    files = TlsFiles(own.certificate, own.key)
    assert server_context(files).verify_mode is ssl.CERT_NONE
    assert server_context(replace(files, client_authorities=own.certificate)).verify_mode is ssl.CERT_REQUIRED


def test_an_encrypted_key_needs_its_password(own: Certificate):
    files = TlsFiles(own.certificate, encrypt(own.key, PASSWORD))
    server_context(replace(files, password=PASSWORD))
    assert "is encrypted" in message(files)  # and OpenSSL does not ask for it on the terminal
    for wrong in ("another", "x" * 2000):
        text = message(replace(files, password=wrong))
        assert "password is not that of" in text
        assert wrong not in text


def test_a_password_is_not_shown(own: Certificate):
    assert PASSWORD not in repr(TlsFiles(own.certificate, own.key, PASSWORD))


def test_a_key_of_another_certificate_is_an_error(own: Certificate, tmp_path: Path):
    other = make_certificate(tmp_path, "other")
    assert f"{other.key} does not belong to" in message(TlsFiles(own.certificate, other.key))


@pytest.mark.parametrize("flag", ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs"])
def test_files_that_cannot_be_read_or_are_not_pem_are_errors(own: Certificate, tmp_path: Path, flag: str):
    field = {"--ssl-certfile": "certificate", "--ssl-keyfile": "key", "--ssl-ca-certs": "client_authorities"}[flag]
    files = TlsFiles(own.certificate, own.key)
    missing, junk = tmp_path / "missing", tmp_path / "junk"
    junk.write_text("no PEM")
    assert f"Cannot read {flag} {missing}: No such file" in message(replace(files, **{field: missing}))  # type: ignore[arg-type]
    assert f"Cannot read {flag} {tmp_path}: Is a directory" in message(replace(files, **{field: tmp_path}))  # type: ignore[arg-type]
    text = message(replace(files, **{field: junk}))  # type: ignore[arg-type]
    assert str(junk) in text
    assert "PEM" in text
