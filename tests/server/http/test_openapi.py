"""The OpenAPI document matches the server: no request generated from it gets a 500.

More cases: `python -m tests.server.http.test_openapi 5000`.
"""

from __future__ import annotations

import sys
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from requests.exceptions import ChunkedEncodingError

from server.http.problem import PROBLEM_MEDIA_TYPE
from tests.server.conftest import Serve, run_server, simulated
from tests.server.test_metrics import value

DECODE = "POST /decode"
INCOMPLETE = 0  # instead of a status


def fuzz(serve: Serve, cases: int) -> Counter[int]:
    """Send `cases` requests to /decode and some to the other routes; return how often each status occurred.

    A status of 500 fails, and so does an error that is not a problem document or an incomplete response without reason.
    """
    statuses: Counter[int] = Counter()
    with serve(simulated(), max_body_bytes=200_000, max_images=2) as running:
        schema = schemathesis.openapi.from_dict(running.client.get("/openapi.json").json())
        schema.config.update(base_url=running.url)
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation in operations:

            @seed(0)
            @settings(
                max_examples=cases if operation.label == DECODE else 20,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy())
            def run(case: schemathesis.Case) -> None:
                try:
                    response = case.call(base_url=running.url)
                except ChunkedEncodingError:
                    statuses[INCOMPLETE] += 1
                    return
                statuses[response.status_code] += 1
                late = response.status_code == 504  # valid for a deadline of a millisecond
                assert late or response.status_code < 500, (response.status_code, response.text)
                if response.status_code >= 400:
                    assert response.headers["content-type"] in ([PROBLEM_MEDIA_TYPE], PROBLEM_MEDIA_TYPE)

            run()
        # A response is incomplete only if a deadline, such as a millisecond, passed after a part of it was sent.
        expired = value(running, "pid_cancelled_total", stage="encoding", reason="deadline-exceeded")
        assert statuses[INCOMPLETE] <= expired
        assert running.client.get("/health/ready").status_code == 200
        assert running.decode().status_code == 200
    return statuses


def test_no_request_generated_from_the_document_breaks_the_server(serve: Serve):
    statuses = fuzz(serve, 200)
    assert statuses[200] > 0
    assert sum(statuses.values()) >= 150


if __name__ == "__main__":
    print(dict(fuzz(run_server, int(sys.argv[1]))))
