"""Every setting of the server: from flags, then from the environment (`PID_*`), then defaults; frozen once read."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.errors import ConfigError
from server.faults import Faults


class Settings(BaseSettings):
    """Serve PiD decodes over HTTP. Each flag can be given as an environment variable: --queue-images as
    PID_QUEUE_IMAGES."""

    model_config = SettingsConfigDict(
        env_prefix="PID_",
        frozen=True,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
    )

    bundle: Path = Field(description="folder that build_engines.py wrote")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    devices: str = Field("auto", description="cpu, or CUDA devices as cuda:0,cuda:1; auto takes the first GPU, if any")
    slots: int | None = Field(None, ge=1, description="images held on a device at once [one more than a batch]")
    max_batch: int | None = Field(None, ge=1, description="images per step at most [as the bundle allows]")
    max_images: int = Field(8, ge=1, description="latents in one request at most")
    max_body: int = Field(64 * 2**20, ge=1024, description="bytes of a request's body at most")
    body_seconds: float = Field(30.0, gt=0, description="seconds a client may take to send its body")
    delivery_seconds: float = Field(120.0, gt=0, description="seconds a client may take to read its answer")
    pending_bytes: int = Field(512 * 2**20, ge=1, description="bytes of pixels admitted and not yet delivered")
    max_connections: int = Field(1024, ge=1, description="connections at once; those beyond are refused with 503")
    max_header: int = Field(16 * 1024, ge=1024, description="bytes of a request's headers at most")
    max_header_fields: int = Field(64, ge=8, description="headers in a request at most")
    header_seconds: float = Field(10.0, gt=0, description="seconds a client may take to send a request's headers")
    keep_alive_seconds: float = Field(30.0, gt=0, description="seconds that a connection may stay idle")
    api_keys: Path | None = Field(None, description="file of API keys, one name:key a line [everybody may decode]")
    key_in_flight: int = Field(64, ge=1, description="requests in flight for each API key")
    queue_images: int = Field(64, ge=1, description="images that may wait")
    queue_seconds: float = Field(120.0, gt=0, description="predicted seconds of work that may wait, per device")
    standard_share: float = Field(
        0.9, gt=0, le=1, description="share of the queue that standard and batch requests together may take"
    )
    batch_share: float = Field(0.5, gt=0, le=1, description="share of the queue that batch requests may take")
    deadline: float = Field(60.0, gt=0, description="seconds within which an image is due if a request does not say")
    max_deadline: float = Field(600.0, gt=0, description="seconds that a request's own deadline may be away at most")
    encoder_threads: int = Field(min(8, os.cpu_count() or 1), ge=1, description="threads that encode images")
    compile: bool | None = Field(
        None, description="fuse work by torch.compile, which takes a while at the start [on CUDA]"
    )
    cpu_threads: int | None = Field(None, ge=1, description="threads of PyTorch on the CPU [as PyTorch picks]")
    drain_delay: float = Field(5.0, ge=0, description="seconds to go on serving after SIGTERM, not ready any more")
    drain_limit: float = Field(60.0, ge=0, description="seconds to finish admitted work after that")
    watchdog_factor: float = Field(20.0, gt=1, description="a step is stuck after this many times its predicted time")
    watchdog_seconds: float = Field(30.0, gt=0, description="and never sooner than after these seconds")
    fail_grace: float = Field(5.0, ge=0, description="seconds from a device's failure to the exit with status 1")
    faults: str = Field("", description="faults to inject, for tests: fail-step=2@10,hang-step,...")
    allow_faults: bool = Field(False, description="whether --faults is meant")
    traces: str | None = Field(None, description="OTLP/HTTP endpoint for traces, http://…/v1/traces [none are made]")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @model_validator(mode="after")
    def _faults_are_for_tests(self) -> Settings:
        if self.faults:
            Faults(self.faults)
            if not self.allow_faults:
                raise ValueError("--faults breaks requests on purpose; if that is meant, give --allow-faults too")
            if not self.is_local:
                raise ValueError(f"--faults is for tests and never for a server that listens on {self.host}")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_settings(arguments: Sequence[str]) -> Settings:
    """Raises ConfigError, one sentence, on a value that cannot be; exits by itself on --help."""
    try:
        return Settings(_cli_parse_args=list(arguments))  # flags or environment fill the rest
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigError(f"{message}.") from None
        name = ".".join(map(str, first["loc"]))
        flag = f"--{name.replace('_', '-')} (or PID_{name.upper()})"
        raise ConfigError(f"{flag}: {message[0].lower()}{message[1:]}.") from None
