"""The error tree: every failure a caller can meet has a type, a stable code and a sentence that says what to do."""

from __future__ import annotations

from typing import ClassVar


class PidError(Exception):
    """Base of all errors raised on purpose.

    `status` is the HTTP status a server answers with, `code` a stable machine-readable name, and `str(error)` one
    sentence for people that says what was wrong and what would be right.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"


class ConfigError(PidError):
    """A setting, flag or network configuration that cannot work."""

    code = "invalid-configuration"


class CheckpointError(PidError):
    """A checkpoint file that is damaged, unsafe, or of another network than the one named."""

    code = "invalid-checkpoint"


class BundleError(PidError):
    """A bundle that is incomplete, altered, or built for another machine or version."""

    code = "invalid-bundle"


class InputError(PidError):
    """Tensors or options that the decoder at hand does not take."""

    status = 422
    code = "invalid-input"


class DecodeError(PidError):
    """One decode failed; others are not affected."""

    code = "decode-failed"


class DeviceMemoryError(PidError):
    """The device has not enough memory for this work."""

    status = 503
    code = "out-of-device-memory"


class DeviceLostError(PidError):
    """The device or its driver is broken; the process has to be restarted."""

    status = 503
    code = "device-lost"
