"""Error hierarchy of the engines: each failure has a type, an HTTP status, a stable code and a helpful message."""

from __future__ import annotations

from typing import ClassVar


class PidError(Exception):
    """Base class of all errors that are raised deliberately.

    The message, `str(error)`, is written for people: what is wrong, then what to do.

    Attributes:
        status: HTTP status of the server's response.
        code: Stable machine-readable name of the error.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"


class ConfigError(PidError):
    """Invalid setting, flag or network configuration."""

    code = "invalid-configuration"


class CheckpointError(PidError):
    """Checkpoint file that is damaged, unsafe, or made for a different network."""

    code = "invalid-checkpoint"


class BundleError(PidError):
    """Bundle that is incomplete, modified, or built for a different machine or version."""

    code = "invalid-bundle"


class InputError(PidError):
    """Tensors or options that the decoder does not support."""

    status = 422
    code = "invalid-input"


class DecodeError(PidError):
    """Failure of a single decode; other decodes are not affected."""

    code = "decode-failed"


class NonFiniteImageError(DecodeError):
    """Decode that ran to its end, but whose image contains NaN or infinity."""


class DeviceMemoryError(PidError):
    """Not enough free memory on the device."""

    status = 503
    code = "out-of-device-memory"


class DeviceLostError(PidError):
    """Broken device or driver; the process must be restarted."""

    status = 503
    code = "device-lost"
