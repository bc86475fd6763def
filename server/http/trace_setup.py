"""Choice of the endpoint for traces: --traces, or OpenTelemetry's environment variables."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engines.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

_ENDPOINT, _TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")  # the first that is set counts
_TRACES_PATH = "/v1/traces"


def find_tracer_provider(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> TracerProvider | None:
    """Return a provider that exports spans, or None if no traces are wanted. OpenTelemetry is only imported for one.

    Args:
        endpoint: Value of --traces, which takes precedence over the environment.
        environment: Environment variables.

    Raises:
        ConfigError: --traces is set and OpenTelemetry is not installed. If only the environment asks for traces, a
            warning is logged instead: such variables are often set for all programs of a machine or cluster.
    """
    found = endpoint or environment_endpoint(environment)
    if found is None:
        return None
    try:
        from server.http import tracing
    except ConfigError as error:
        if endpoint is not None:
            raise
        log.warning("no traces are exported to %s: %s", found, error)
        return None
    return tracing.tracer_provider(found)


def environment_endpoint(environment: Mapping[str, str]) -> str | None:
    """Return the URL that the environment selects for traces over OTLP/HTTP, or None.

    Follows OpenTelemetry's "OTLP Exporter Configuration": the variable for traces is a complete URL, and the variable
    for all signals is the beginning of one. An empty variable counts as not set.
    """
    values = {name: value.strip() for name, value in environment.items() if name.startswith("OTEL_")}
    found = values.get(_TRACES_ENDPOINT) or None
    if found is None and values.get(_ENDPOINT):
        found = values[_ENDPOINT].rstrip("/") + _TRACES_PATH
    exporters = [name.strip() for name in (values.get("OTEL_TRACES_EXPORTER") or "otlp").lower().split(",")]
    if found is None or values.get("OTEL_SDK_DISABLED", "").lower() == "true" or "otlp" not in exporters:
        return None
    protocol = next((values[name] for name in _PROTOCOLS if values.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning(
            "no traces are exported to %s: the protocol %s is not supported, only http/protobuf", found, protocol
        )
        return None
    return found
