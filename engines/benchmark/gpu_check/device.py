"""Test of the device in a separate process."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from engines.errors import ConfigError
from engines.runtime.devices import find_device

TEST_SECONDS = 60.0  # time in which a device must have run a kernel


def find_device_in_fork(name: str, seconds: float = TEST_SECONDS) -> torch.device:
    """Call `find_device` in a process that ends with the call.

    The context that it creates takes hundreds of MiB of the device's memory, which would distort measurements by other
    processes, and a broken driver may block for ever.

    Raises:
        ConfigError: The device is not available, or did not respond within `seconds`.
    """
    context = get_context("fork")  # importing PyTorch again would take seconds; CUDA has not been initialised here
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_find, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise ConfigError(f"The device {name} did not respond within {seconds:g} s.")
        result: torch.device | ConfigError = receiver.recv()
    except EOFError as error:
        raise ConfigError(f"The process that tested the device {name} died.") from error
    finally:
        process.kill()
    if isinstance(result, ConfigError):
        raise result
    return result


def _find(name: str, sender: Connection) -> None:
    try:
        sender.send(find_device(name))
    except ConfigError as error:
        sender.send(error)
