"""The kinds of requests of the soak test, and a short run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtest.soak.__main__ import main, soak
from loadtest.soak.kinds import BAD, GOOD, Behaviour, make_kinds

KEYS = {GOOD: "g" * 32, BAD: "b" * 32}


def test_kinds_have_distinct_names_and_only_clients_that_leave_expect_no_result():
    kinds = make_kinds((4, 8, 8), KEYS, max_body_bytes=4096)
    assert len({kind.name for kind in kinds}) == len(kinds)
    leaving = (Behaviour.ABORT, Behaviour.ABORT_STREAMING, Behaviour.UNREAD)
    assert all((kind.expected == ()) == (kind.behaviour in leaving) for kind in kinds)
    assert not any("500" in kind.expected for kind in kinds)


def test_good_requests_have_their_own_key():
    for kind in make_kinds((4, 8, 8), KEYS, max_body_bytes=4096):
        assert (KEYS[GOOD].encode() in kind.data) == kind.name.startswith("good")


def test_an_invalid_option_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["--requests", "many"])
    assert caught.value.code == 2
    assert "--requests" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_accounts_for_every_request(tmp_path: Path):
    report = asyncio.run(soak(requests=400, duration=4.0, folder=tmp_path, memory_bound_mb=50.0))
    assert report.requests == 400
    assert report.unexpected() == {}
    assert report.exit_status == 0
    assert not any(report.metrics.values())
