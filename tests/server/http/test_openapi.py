"""The OpenAPI document is valid, suits generators of clients, and matches the server.

No request generated from it gets a 500, and all responses have the statuses, headers and types that it describes.

More cases: `python -m tests.server.http.test_openapi 5000`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from requests.exceptions import ChunkedEncodingError
from schemathesis.specs.openapi import checks

from server.body.media import JSON
from server.http.openapi import ERRORS
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.request import DecodeOptions
from tests.server.conftest import Running, Serve, run_server, simulated
from tests.server.test_metrics import value

CONFORMANCE = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
INCOMPLETE = 0  # instead of a status


def fuzz(serve: Serve, cases: int) -> Counter[int]:
    """Send `cases` requests, most of them for decodes; return how often each status occurred.

    A status of 500 fails, and so does an error that is not a problem document or an incomplete response without reason.
    """
    statuses: Counter[int] = Counter()
    with serve(simulated(), max_body_bytes=200_000, max_images=2) as running:
        schema = schemathesis.openapi.from_dict(running.client.get("/openapi.json").json())
        schema.config.update(base_url=running.url)
        operations = [result.ok() for result in schema.get_all_operations()]
        decodes = [operation for operation in operations if operation.method == "post"]
        for operation in operations:

            @seed(0)
            @settings(
                max_examples=cases // len(decodes) if operation in decodes else 20,
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
                    media_type = JSON if case.path.startswith("/v2") else PROBLEM_MEDIA_TYPE
                    assert response.headers["content-type"] in ([media_type], media_type)
                case.validate_response(response, checks=CONFORMANCE)

            run()
        # A response is incomplete only if a deadline, such as a millisecond, passed after a part of it was sent.
        expired = value(running, "pid_cancelled_total", stage="encoding", reason="deadline-exceeded")
        assert statuses[INCOMPLETE] <= expired
        assert running.client.get("/health/ready").status_code == 200
        assert running.decode().status_code == 200
    return statuses


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    document: dict[str, Any] = server.client.get("/openapi.json").json()
    return document


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def references(value: object) -> Iterator[str]:
    """Yield every reference in a part of a document."""
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for member in value.values():
            yield from references(member)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_it_is_a_valid_openapi_3_1_document(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()


def test_every_reference_resolves_and_every_component_is_used(document: dict[str, Any]):
    defined = {
        f"#/components/{kind}/{name}"
        for kind, components in document["components"].items()
        if kind != "securitySchemes"
        for name in components
    }
    assert set(references(document)) == defined


def test_operation_ids_are_short_unique_names_of_functions(document: dict[str, Any]):
    ids = [operation["operationId"] for operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+){0,2}", name) for name in ids)
    assert {"decode", "info", "live", "ready", "metrics"} <= set(ids)


def test_a_generated_client_sends_only_the_options_that_its_caller_sets(document: dict[str, Any]):
    operation = document["paths"]["/decode"]["post"]
    assert all(not parameter["required"] for parameter in operation["parameters"])
    schemas = document["components"]["schemas"]
    described = [parameter["schema"] for parameter in operation["parameters"]]
    for name in ("DecodeBody", "DecodeForm"):
        assert schemas[name]["required"] == ["latent"]
        assert schemas[name]["properties"].keys() > DecodeOptions.model_fields.keys()
        described += schemas[name]["properties"].values()
    assert not [schema for schema in described if "default" in schema or {"type": "null"} in schema.get("anyOf", ())]


def test_every_option_and_parameter_has_a_description(document: dict[str, Any]):
    parameters = {x["name"]: x["description"] for x in document["paths"]["/decode"]["post"]["parameters"]}
    assert parameters.keys() > DecodeOptions.model_fields.keys()
    assert all(parameters.values())


def test_all_errors_are_the_same_problem(document: dict[str, Any]):
    responses = document["components"]["responses"]
    assert len(responses) == len(ERRORS)
    for response in responses.values():
        assert response["content"] == {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        assert "X-Request-Id" in response["headers"]
    assert "Retry-After" in responses["TooManyRequests"]["headers"]
    for operation in operations(document):
        assert {"400", "404", "405", "431", "500", "503"} <= operation["responses"].keys()


def test_a_problem_has_all_members_that_its_schema_requires(server: Running, document: dict[str, Any]):
    schema = document["components"]["schemas"]["Problem"]
    for problem in (server.client.get("/nowhere").json(), server.decode(steps=9).json()):
        assert set(schema["required"]) <= problem.keys() <= schema["properties"].keys()


@pytest.mark.parametrize("requires_keys", [True, False])
def test_operations_need_a_key_only_if_the_server_has_keys(serve: Serve, tmp_path: Path, requires_keys: bool):
    (tmp_path / "keys").write_text("alice: alice-0123456789abcdef\n")
    headers = {"Authorization": "Bearer alice-0123456789abcdef"}
    with serve(api_keys=tmp_path / "keys" if requires_keys else None) as running:
        document = running.client.get("/openapi.json", headers=headers).json()
        for path, operations in document["paths"].items():
            security = operations.get("get", {}).get("security", document["security"])
            needs_key = {} not in security and bool(security)
            assert "get" not in operations or (running.client.get(path).status_code == 401) == needs_key, path
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert document["security"] == ([{"bearer": []}] if requires_keys else [{}, {"bearer": []}])


def test_no_request_generated_from_the_document_breaks_the_server(serve: Serve):
    statuses = fuzz(serve, 200)
    assert statuses[200] > 0
    assert sum(statuses.values()) >= 150


if __name__ == "__main__":
    print(dict(fuzz(run_server, int(sys.argv[1]))))
