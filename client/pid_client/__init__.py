"""Client of the PiD decode server: latents in, images four times the size out."""

from pid_client.async_client import AsyncImageStream, AsyncPidClient
from pid_client.client import ImageStream, PidClient
from pid_client.errors import (
    ConnectionLostError,
    DeadlineError,
    DecodeFailedError,
    InvalidRequestError,
    OverloadedError,
    PidError,
    ResponseError,
    UnauthorizedError,
    UnavailableError,
)
from pid_client.image import Image, ImageInfo, Preview
from pid_client.requests import Options
from pid_client.server_info import DecoderInfo, ServerInfo
from pid_client.version import __version__

__all__ = [
    "AsyncImageStream",
    "AsyncPidClient",
    "ConnectionLostError",
    "DeadlineError",
    "DecodeFailedError",
    "DecoderInfo",
    "Image",
    "ImageInfo",
    "ImageStream",
    "InvalidRequestError",
    "Options",
    "OverloadedError",
    "PidClient",
    "PidError",
    "Preview",
    "ResponseError",
    "ServerInfo",
    "UnauthorizedError",
    "UnavailableError",
    "__version__",
]
