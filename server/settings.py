"""Every setting of the server: from flags, then from the environment (`PID_*`), then defaults; frozen once read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.errors import ConfigError


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
    queue_images: int = Field(64, ge=1, description="images that may wait")
    queue_seconds: float = Field(120.0, gt=0, description="predicted seconds of work that may wait, per device")
    deadline: float = Field(60.0, gt=0, description="seconds within which an image is due if a request does not say")
    max_deadline: float = Field(600.0, gt=0, description="seconds that a request's own deadline may be away at most")
    encoder_threads: int = Field(min(8, os.cpu_count() or 1), ge=1, description="threads that encode images")
    cpu_threads: int | None = Field(None, ge=1, description="threads of PyTorch on the CPU [as PyTorch picks]")
    drain_delay: float = Field(5.0, ge=0, description="seconds to go on serving after SIGTERM, not ready any more")
    drain_limit: float = Field(60.0, ge=0, description="seconds to finish admitted work after that")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")


def read_settings(arguments: Sequence[str]) -> Settings:
    """Raises ConfigError, one sentence, on a value that cannot be; exits by itself on --help."""
    try:
        return Settings(_cli_parse_args=list(arguments))  # type: ignore[call-arg]  # flags or environment fill them
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        flag = f"--{name.replace('_', '-')} (or PID_{name.upper()})"
        raise ConfigError(f"{flag}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None
