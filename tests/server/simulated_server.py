"""A server process on the simulated runtime: `python -m tests.server.simulated_server [flags]`.

Prints its port once it is ready. A step lasts SECONDS_PER_STEP.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import uvicorn

from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.command_line import read_settings
from server.lifecycle import State
from server.main import Server, serve
from server.process.listen import listening
from server.service import DecodeService
from server.swaps import FixedDecoders, Swaps

SIZE, SECONDS_PER_STEP = Size(64, 64), 0.05
SLOW_TO_ENCODE = Size(1024, 1024)  # decoding takes no time


def print_port_when_ready() -> None:
    """Catch the server that `serve` creates and print its port once it is ready."""
    created: list[Server] = []
    init = Server.__init__

    def recording_init(self: Server, config: uvicorn.Config, service: DecodeService, swaps: Swaps) -> None:
        init(self, config, service, swaps)
        created.append(self)

    Server.__init__ = recording_init  # type: ignore[method-assign]

    def wait() -> None:
        while not (created and created[0].started and created[0].service.lifecycle.state is not State.STARTING):
            time.sleep(0.01)
        print(created[0].servers[0].sockets[0].getsockname()[1], file=sys.stderr, flush=True)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    print_port_when_ready()
    settings = read_settings(["--bundle", ".", "--port", "0", "--encoder-threads", "1", *sys.argv[1:]])
    runtime = SimulatedRuntime(
        {SIZE: SimulatedCost(step=SECONDS_PER_STEP), SLOW_TO_ENCODE: SimulatedCost()}, max_batch=1, slots=1
    )
    with listening(settings.address) as listener:
        status = serve(settings, listener, FixedDecoders({"simulated": {"device": runtime}}))
    os._exit(status)
