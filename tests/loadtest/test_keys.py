"""API keys of load tests."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from engines.errors import ConfigError
from loadtest.keys import authorization, create_keys, read_keys
from server.http.auth import KeyFile


def test_created_keys_differ_and_are_those_that_the_server_and_the_client_read(tmp_path: Path):
    path = tmp_path / "keys"
    keys = create_keys(path, ("one", "two"))
    assert len(set(keys.values())) == 2
    assert read_keys(path) == keys
    assert [KeyFile(path).name_of(key) for key in keys.values()] == ["one", "two"]


def test_only_the_owner_may_read_created_keys_even_if_the_file_existed(tmp_path: Path):
    path = tmp_path / "keys"
    path.touch(mode=0o644)
    create_keys(path, ("one",))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_comments_and_empty_lines_of_a_key_file_are_ignored(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# name:key\n\n one : 0123456789abcdef \n")
    assert read_keys(path) == {"one": "0123456789abcdef"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "secret-without-a-name\n", "name:\n"])
def test_an_invalid_key_file_is_named_without_quoting_keys(tmp_path: Path, text: str):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"keys .*\.$") as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)


def test_a_missing_key_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="Cannot read the API key file"):
        read_keys(tmp_path / "nowhere")


def test_requests_without_a_named_key_use_the_first_one():
    keys = {"one": "1111", "two": "2222"}
    assert authorization(keys) == {"Authorization": "Bearer 1111"}
    assert authorization(keys, "two") == {"Authorization": "Bearer 2222"}
    assert authorization({}) == {}


def test_a_key_that_is_not_in_the_file_is_named():
    with pytest.raises(ConfigError, match="needs the API key three"):
        authorization({"one": "1111"}, "three")
