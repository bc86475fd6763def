"""The server's settings, which are also its command-line flags and `PID_*` environment variables."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from engines.size import MAX_SIZES, Size
from server.faults import Faults
from server.flag_values import read_bundles, read_origins, read_sizes
from server.flags import (
    BYTES,
    Flag,
    Metavar,
    flag_name,
)
from server.log_formats import LogFormat
from server.process.listen import Address
from server.process.tls import TlsFiles

READ_RATE_WINDOW = 10.0  # seconds over which --min-read-rate is measured
STALL_FACTOR = 4.0  # a step stalls the server after this multiple of its predicted time, and not before --stall-seconds

Count = Annotated[int, Field(ge=1), Metavar("COUNT")]
OptionalCount = Annotated[int | None, Field(ge=1), Metavar("COUNT")]
Bytes = Annotated[int, Field(ge=1), Metavar(BYTES)]
LimitBytes = Annotated[int, Field(ge=1024), Metavar(BYTES)]
OptionalLimitBytes = Annotated[int | None, Field(ge=1024), Metavar(BYTES)]
Seconds = Annotated[float, Field(gt=0), Metavar("SECONDS")]
Delay = Annotated[float, Field(ge=0), Metavar("SECONDS")]
Fraction = Annotated[float, Field(gt=0, le=1), Metavar("FRACTION")]

# Headings of --help
MODEL = "model and devices"
CAPTIONS = "captions"
HTTP = "HTTP"
LIMITS = "limits"
SCHEDULING = "scheduling"
SHUTDOWN = "shutdown and failure"
OBSERVABILITY = "observability"
TESTING = "testing"


class Settings(BaseModel):
    """All settings of a server, documented by their flags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Annotated[
        dict[str, Path],
        BeforeValidator(read_bundles),
        Metavar("[NAME=]DIR"),
        Flag(MODEL, "bundle written by build_engines.py; several, each with a name, by repeating it", repeatable=True),
    ]
    devices: Annotated[
        str,
        Metavar("DEVICES"),
        Flag(MODEL, "cpu, or CUDA devices such as cuda:0,cuda:1; auto is the first GPU, or the CPU for the target cpu"),
    ] = "auto"
    device_slots: Annotated[
        OptionalCount, Flag(MODEL, "images on a device at once", "one more than a batch", renamed_from="slots")
    ] = None
    resident: Annotated[
        OptionalCount,
        Flag(MODEL, "decoders whose weights are on a device at once; those of the others stay in host memory", "all"),
    ] = None
    max_batch: Annotated[OptionalCount, Flag(MODEL, "maximum images per step", "the bundle's maximum")] = None
    sizes: Annotated[
        tuple[Size, ...] | None,
        BeforeValidator(read_sizes),
        Field(min_length=1, max_length=MAX_SIZES),
        Metavar("SIZES"),
        Flag(MODEL, "output sizes to decode, HEIGHTxWIDTH, such as 2048x2048,1536x2688", "those of the bundle"),
    ] = None
    max_pixels: Annotated[
        OptionalCount,
        Flag(MODEL, "pixels of the largest image to decode in tiles; each slot needs 24 bytes per pixel", "no tiles"),
    ] = None
    compile: Annotated[bool | None, Flag(MODEL, "use torch.compile, which slows down start-up", "only on CUDA")] = None
    kernels: Annotated[
        Literal["auto", "pytorch"],
        Flag(MODEL, "kernels to choose from on a GPU: all by measurement (auto), or only those of PyTorch (pytorch)"),
    ] = "auto"
    cache_dir: Annotated[
        Path | None,
        Metavar("DIR"),
        Flag(MODEL, "directory to keep compiled code in", "pid-server in $XDG_CACHE_HOME or ~/.cache"),
    ] = None
    cpu_threads: Annotated[OptionalCount, Flag(MODEL, "threads of PyTorch on the CPU", "PyTorch's choice")] = None

    text_encoder: Annotated[
        Path | None,
        Metavar("DIR"),
        Flag(CAPTIONS, "Gemma-2-2b-it in the format of Hugging Face, which encodes prompts", "no prompts"),
    ] = None
    caption_prefix: Annotated[
        Path | None, Metavar("FILE"), Flag(CAPTIONS, "instruction text in front of each prompt", "no text")
    ] = None
    text_encoder_device: Annotated[
        str, Metavar("DEVICE"), Flag(CAPTIONS, "device of the text encoder: cpu, or a CUDA device such as cuda:0")
    ] = "cpu"
    caption_cache_bytes: Annotated[
        int, Field(ge=0), Metavar(BYTES), Flag(CAPTIONS, "memory for encoded prompts; each needs 1.4 MB at 300 tokens")
    ] = 256 * 2**20
    caption_cache: Annotated[
        Path | None, Metavar("DIR"), Flag(CAPTIONS, "directory to keep encoded prompts in; servers can share it")
    ] = None
    caption_disk_bytes: Annotated[Bytes, Flag(CAPTIONS, "size of the files in --caption-cache")] = 8 * 2**30

    host: Annotated[str, Metavar("ADDRESS"), Flag(HTTP, "address to listen on")] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535), Metavar("PORT"), Flag(HTTP, "port to listen on; 0 picks a free one")
    ] = 8000
    uds: Annotated[
        Path | None, Metavar("PATH"), Flag(HTTP, "Unix socket to listen on, instead of --host and --port", "none")
    ] = None
    ssl_certfile: Annotated[
        Path | None,
        Metavar("FILE"),
        Flag(HTTP, "certificate for HTTPS with its chain, in PEM format", "HTTP without TLS"),
    ] = None
    ssl_keyfile: Annotated[
        Path | None, Metavar("FILE"), Flag(HTTP, "private key of the certificate", "in --ssl-certfile")
    ] = None
    ssl_keyfile_password: Annotated[
        SecretStr | None, Metavar("PASSWORD"), Flag(HTTP, "password of the private key; better set by its variable")
    ] = None
    ssl_ca_certs: Annotated[
        Path | None,
        Metavar("FILE"),
        Flag(HTTP, "authorities one of which must have signed the certificate of a client", "no client certificates"),
    ] = None
    api_keys: Annotated[
        Path | None, Metavar("FILE"), Flag(HTTP, "file of API keys, one name:key per line", "no authentication")
    ] = None
    cors_origins: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(read_origins),
        Metavar("ORIGINS"),
        Flag(
            HTTP, "web pages that may use the server from a browser, such as https://example.com, or * for all", "none"
        ),
    ] = None
    playground: Annotated[bool, Flag(HTTP, "serve a page to try the server in a browser at /", "yes")] = True
    encoder_threads: Annotated[Count, Flag(HTTP, "threads that encode images", "one per core, at most 8")] = min(
        8, os.cpu_count() or 1
    )
    header_timeout: Annotated[
        Seconds, Flag(HTTP, "time for a client to send a request's headers", renamed_from="header_seconds")
    ] = 10.0
    body_timeout: Annotated[
        Seconds, Flag(HTTP, "time for a client to send a request's body", renamed_from="body_seconds")
    ] = 30.0
    response_timeout: Annotated[
        Seconds, Flag(HTTP, "time for a client to read a response", renamed_from="delivery_seconds")
    ] = 120.0
    keep_alive_timeout: Annotated[
        Seconds, Flag(HTTP, "time after which an idle connection is closed", renamed_from="keep_alive_seconds")
    ] = 75.0  # longer than the 60 s after which most load balancers close theirs

    min_read_rate: Annotated[
        Bytes, Flag(HTTP, "bytes per second that a client must read of a response that waits for it")
    ] = 32 * 2**10
    max_requests_per_connection: Annotated[Count, Flag(HTTP, "requests after which a connection is closed")] = 10_000
    max_connection_age: Annotated[
        Seconds, Flag(HTTP, "time after which a connection is closed, once its response is complete")
    ] = 3600.0

    max_connections: Annotated[Count, Flag(LIMITS, "open connections; requests on further ones get 503")] = 1024
    max_headers: Annotated[
        int,
        Field(ge=8),
        Metavar("COUNT"),
        Flag(LIMITS, "headers per request", renamed_from="max_header_fields"),
    ] = 64
    max_header_bytes: Annotated[LimitBytes, Flag(LIMITS, "size of a request's headers", renamed_from="max_header")] = (
        16 * 2**10
    )
    max_body_bytes: Annotated[
        OptionalLimitBytes,
        Flag(LIMITS, "size of a request's body", "the largest that the decoder can use", renamed_from="max_body"),
    ] = None
    body_memory_bytes: Annotated[
        Bytes, Flag(LIMITS, "bodies of all requests, until they are parsed; one always fits")
    ] = 256 * 2**20
    max_images: Annotated[Count, Flag(LIMITS, "latents per request")] = 8
    max_in_flight_per_key: Annotated[
        Count, Flag(LIMITS, "requests in flight per API key", renamed_from="key_in_flight")
    ] = 64
    pending_bytes: Annotated[Bytes, Flag(LIMITS, "memory of all accepted images that are not yet delivered")] = (
        512 * 2**20
    )

    queue_images: Annotated[Count, Flag(SCHEDULING, "maximum number of images that wait for a device")] = 64
    queue_seconds: Annotated[Seconds, Flag(SCHEDULING, "maximum predicted work of all accepted images, per device")] = (
        120.0
    )
    fair_by: Annotated[
        Literal["key", "address"],
        Metavar("CLIENT"),
        Flag(SCHEDULING, "clients that get fair shares: key (without --api-keys, all are one) or address"),
    ] = "key"
    interactive_share: Annotated[Fraction, Flag(SCHEDULING, "share of the queue that interactive requests may use")] = (
        0.8
    )
    standard_share: Annotated[
        Fraction, Flag(SCHEDULING, "share of the queue that batch and standard requests together may use")
    ] = 0.9
    batch_share: Annotated[Fraction, Flag(SCHEDULING, "share of the queue that batch requests may use")] = 0.5
    deadline: Annotated[
        Seconds, Flag(SCHEDULING, "deadline of a request that sets none, counted from its admission")
    ] = 60.0
    max_deadline: Annotated[Seconds, Flag(SCHEDULING, "maximum deadline that a request may set")] = 600.0

    drain_delay: Annotated[
        Delay, Flag(SHUTDOWN, "time after SIGTERM during which /health/ready returns 503 and requests are accepted")
    ] = 5.0
    drain_limit: Annotated[Delay, Flag(SHUTDOWN, "time after --drain-delay for accepted requests to finish")] = 60.0
    stall_seconds: Annotated[
        Seconds,
        Flag(
            SHUTDOWN, f"time (at least {STALL_FACTOR:g} times the predicted one) after which a step stalls the server"
        ),
    ] = 1.0
    watchdog_factor: Annotated[
        float,
        Field(gt=1),
        Metavar("FACTOR"),
        Flag(SHUTDOWN, "a step is stuck after this multiple of its predicted time"),
    ] = 20.0
    watchdog_seconds: Annotated[Seconds, Flag(SHUTDOWN, "minimum time before a step counts as stuck")] = 30.0
    failure_exit_delay: Annotated[
        Delay, Flag(SHUTDOWN, "time from a device failure to the exit with status 1", renamed_from="fail_grace")
    ] = 5.0

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Metavar("LEVEL"),
        Flag(OBSERVABILITY, "minimum log level: debug, info, warning or error"),
    ] = "info"
    log_format: Annotated[
        LogFormat, Metavar("FORMAT"), Flag(OBSERVABILITY, "format of the log: json, or text for reading")
    ] = "json"
    traces: Annotated[
        str | None,
        Metavar("URL"),
        Flag(
            OBSERVABILITY, "OTLP/HTTP endpoint, such as http://HOST:4318/v1/traces", "from OTEL_EXPORTER_OTLP_ENDPOINT"
        ),
    ] = None

    faults: Annotated[
        str,
        Metavar("FAULTS"),
        Flag(TESTING, "faults to inject, such as fail-step=2@10,hang-step; requires --allow-faults"),
    ] = ""
    allow_faults: Annotated[bool, Flag(TESTING, "allow --faults")] = False

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

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{flag_name(name)} needs --ssl-certfile, the certificate of the server")
        return self

    def resident_of(self, decoders: int) -> int | None:
        """Return how many of a number of decoders have their weights on a device at once; None if all have."""
        return self.resident if self.resident is not None and self.resident < decoders else None

    @property
    def address(self) -> Address:
        """Where to listen."""
        if self.ssl_certfile is None:
            return Address(self.host, self.port, self.uds)
        password = None if self.ssl_keyfile_password is None else self.ssl_keyfile_password.get_secret_value()
        tls = TlsFiles(self.ssl_certfile, self.ssl_keyfile, password, self.ssl_ca_certs)
        return Address(self.host, self.port, self.uds, tls)

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach the server."""
        if self.uds is not None:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
