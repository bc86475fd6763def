"""The server's settings, from command-line flags, then `PID_*` environment variables, then defaults."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines import __version__
from engines.cli import ArgumentParser
from engines.errors import ConfigError
from server.faults import Faults
from server.flags import BYTES, Flag, add_flags, environment_values, flag_name, unknown_variables, variable_name

log = logging.getLogger(__name__)

PREFIX = "PID_"

_MODEL = "model and devices"
_HTTP = "HTTP"
_LIMITS = "limits"
_SCHEDULING = "scheduling"
_SHUTDOWN = "shutdown and failure"
_OBSERVABILITY = "observability"
_TESTING = "testing"


class Settings(BaseModel):
    """All settings of a server; `Flag.help` documents each of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Annotated[Path, Flag(_MODEL, "bundle written by build_engines.py", "DIR")]
    devices: Annotated[
        str,
        Flag(_MODEL, "cpu, or CUDA devices such as cuda:0,cuda:1; auto uses the first GPU, else the CPU", "DEVICES"),
    ] = "auto"
    device_slots: Annotated[
        int | None,
        Field(ge=1),
        Flag(_MODEL, "images on a device at once", "COUNT", default="one more than a batch", renamed_from="slots"),
    ] = None
    max_batch: Annotated[
        int | None, Field(ge=1), Flag(_MODEL, "maximum images per step", "COUNT", default="the bundle's maximum")
    ] = None
    compile: Annotated[
        bool | None, Flag(_MODEL, "use torch.compile, which slows down start-up", default="only on CUDA")
    ] = None
    cpu_threads: Annotated[
        int | None, Field(ge=1), Flag(_MODEL, "threads of PyTorch on the CPU", "COUNT", default="PyTorch's choice")
    ] = None

    host: Annotated[str, Flag(_HTTP, "address to listen on", "ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535), Flag(_HTTP, "port to listen on; 0 picks a free one", "PORT")] = 8000
    api_keys: Annotated[
        Path | None,
        Flag(_HTTP, "file of API keys, one name:key per line", "FILE", default="no authentication"),
    ] = None
    encoder_threads: Annotated[
        int, Field(ge=1), Flag(_HTTP, "threads that encode images", "COUNT", default="one per core, at most 8")
    ] = min(8, os.cpu_count() or 1)
    header_timeout: Annotated[
        float,
        Field(gt=0),
        Flag(_HTTP, "time for a client to send a request's headers", "SECONDS", renamed_from="header_seconds"),
    ] = 10.0
    body_timeout: Annotated[
        float,
        Field(gt=0),
        Flag(_HTTP, "time for a client to send a request's body", "SECONDS", renamed_from="body_seconds"),
    ] = 30.0
    response_timeout: Annotated[
        float,
        Field(gt=0),
        Flag(_HTTP, "time for a client to read a response", "SECONDS", renamed_from="delivery_seconds"),
    ] = 120.0
    keep_alive_timeout: Annotated[
        float,
        Field(gt=0),
        Flag(_HTTP, "time after which an idle connection is closed", "SECONDS", renamed_from="keep_alive_seconds"),
    ] = 30.0

    max_connections: Annotated[
        int, Field(ge=1), Flag(_LIMITS, "connections at once; requests on further ones get 503", "COUNT")
    ] = 1024
    max_headers: Annotated[
        int, Field(ge=8), Flag(_LIMITS, "headers per request", "COUNT", renamed_from="max_header_fields")
    ] = 64
    max_header_bytes: Annotated[
        int, Field(ge=1024), Flag(_LIMITS, "size of a request's headers", BYTES, renamed_from="max_header")
    ] = 16 * 2**10
    max_body_bytes: Annotated[
        int, Field(ge=1024), Flag(_LIMITS, "size of a request's body", BYTES, renamed_from="max_body")
    ] = 64 * 2**20
    max_images: Annotated[int, Field(ge=1), Flag(_LIMITS, "latents per request", "COUNT")] = 8
    max_in_flight_per_key: Annotated[
        int, Field(ge=1), Flag(_LIMITS, "requests in flight per API key", "COUNT", renamed_from="key_in_flight")
    ] = 64
    pending_bytes: Annotated[
        int, Field(ge=1), Flag(_LIMITS, "pixels of all images admitted and not yet delivered", BYTES)
    ] = 512 * 2**20

    queue_images: Annotated[int, Field(ge=1), Flag(_SCHEDULING, "images waiting for a device", "COUNT")] = 64
    queue_seconds: Annotated[
        float, Field(gt=0), Flag(_SCHEDULING, "predicted work waiting for a device, per device", "SECONDS")
    ] = 120.0
    standard_share: Annotated[
        float,
        Field(gt=0, le=1),
        Flag(_SCHEDULING, "share of the queue that batch and standard requests together may use", "FRACTION"),
    ] = 0.9
    batch_share: Annotated[
        float, Field(gt=0, le=1), Flag(_SCHEDULING, "share of the queue that batch requests may use", "FRACTION")
    ] = 0.5
    deadline: Annotated[
        float, Field(gt=0), Flag(_SCHEDULING, "deadline of a request that sets none, from its admission", "SECONDS")
    ] = 60.0
    max_deadline: Annotated[
        float, Field(gt=0), Flag(_SCHEDULING, "upper limit for a request's own deadline", "SECONDS")
    ] = 600.0

    drain_delay: Annotated[
        float,
        Field(ge=0),
        Flag(_SHUTDOWN, "time after SIGTERM in which requests are still accepted, with readiness off", "SECONDS"),
    ] = 5.0
    drain_limit: Annotated[
        float, Field(ge=0), Flag(_SHUTDOWN, "time after that for admitted requests to finish", "SECONDS")
    ] = 60.0
    watchdog_factor: Annotated[
        float, Field(gt=1), Flag(_SHUTDOWN, "a step is stuck after this multiple of its predicted time", "FACTOR")
    ] = 20.0
    watchdog_seconds: Annotated[
        float, Field(gt=0), Flag(_SHUTDOWN, "minimum time before a step counts as stuck", "SECONDS")
    ] = 30.0
    failure_exit_delay: Annotated[
        float,
        Field(ge=0),
        Flag(_SHUTDOWN, "time from a device failure to the exit with status 1", "SECONDS", renamed_from="fail_grace"),
    ] = 5.0

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Flag(_OBSERVABILITY, "minimum log level: debug, info, warning or error", "LEVEL"),
    ] = "info"
    traces: Annotated[
        str | None,
        Flag(_OBSERVABILITY, "OTLP/HTTP endpoint, http://HOST:4318/v1/traces", "URL", default="no traces"),
    ] = None

    faults: Annotated[
        str, Flag(_TESTING, "faults to inject, such as fail-step=2@10,hang-step; needs --allow-faults", "FAULTS")
    ] = ""
    allow_faults: Annotated[bool, Flag(_TESTING, "required in addition to --faults")] = False

    @model_validator(mode="after")
    def _check_faults(self) -> Settings:
        if self.faults:
            Faults(self.faults)
            if not self.allow_faults:
                raise ValueError("--faults makes requests fail on purpose; add --allow-faults to confirm")
            if not self.is_local:
                raise ValueError(
                    f"--faults is not allowed on a server that listens on {self.host}; use a loopback host"
                )
        return self

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_settings(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from flags, then from the environment, then from defaults.

    `--help`, `--version` and unknown flags end the process.

    Raises:
        ConfigError: a value is missing or invalid; the message names the flag and the variable.
    """
    flags = vars(_parser().parse_args(arguments))
    try:
        return Settings(**{**environment_values(Settings, PREFIX, environment), **flags})
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def warn_about_unknown_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Log the variables that begin with `PID_` and are not settings, as a misspelt one would be ignored silently."""
    unknown = unknown_variables(Settings, PREFIX, environment)
    if unknown:
        names = [f"{name} (did you mean {closest}?)" if closest else name for name, closest in unknown.items()]
        log.warning("unknown environment variables are ignored: %s", ", ".join(names))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m server",
        allow_abbrev=False,
        usage="%(prog)s --bundle DIR [flags]",
        description="Serve PiD decodes over HTTP.",
        epilog="Each flag is also an environment variable: --queue-images is PID_QUEUE_IMAGES. Flags take precedence.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    parser.add_argument("--version", action="version", version=f"pid-decode-server {__version__}")
    add_flags(parser, Settings)
    return parser


def _explain(error: ValidationError) -> str:
    """Return one sentence on the first invalid setting."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to")[0]
    if not first["loc"]:
        return f"{message}."
    name = str(first["loc"][0])
    names = f"{flag_name(name)} (or {variable_name(PREFIX, name)})"
    if first["type"] == "missing":
        return f"{names} is required; see --help."
    return f"{names} {message}, not {str(first['input'])[:80]!r}."
