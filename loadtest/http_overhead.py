"""What HTTP costs: `python -m loadtest.http_overhead` sends decodes to a server whose decoder costs nothing.

The server runs in this process and its clients in another, so that the process time counted is the server's alone:
reading the request, scheduling, encoding the PNG, sending it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from safetensors.torch import save

from engines.bundled.decoder import PHOTO
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.png_encoder import read_photo
from server.http.app import create_app
from server.http.connections import http_config
from server.images import png
from server.lifecycle import State
from server.service import DecodeService
from server.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.http_overhead", description="Measure what HTTP costs.")
    parser.add_argument("--size", type=int, default=2048, help="pixels a side of the answer (default: 2048)")
    parser.add_argument("--requests", type=int, default=50, help="requests, one after the other (default: 50)")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    options = parser.parse_args(arguments)
    report = measure(options.size, options.requests)
    for name, value in report.items():
        print(f"{name:<40}{value:>10.2f}" if isinstance(value, float) else f"{name:<40}{value:>10}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(size: int, requests: int) -> dict[str, Any]:
    """Milliseconds a request: of the server's processor time, of encoding alone, and as its client sees it."""
    picture, _ = read_photo(PHOTO, size)
    png.warm_up()
    square = Size(size, size)
    runtime = SimulatedRuntime({square: SimulatedCost()}, {square: picture})
    service = DecodeService(Settings(bundle=Path(), encoder_threads=2), {"simulated": runtime})
    server = uvicorn.Server(http_config(create_app(service), service.settings))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while service.lifecycle.state is State.STARTING or not server.started:
        time.sleep(0.01)
    latent = torch.zeros(16, *runtime.info.latent_size(square), dtype=torch.float16)
    with multiprocessing.get_context("spawn").Pool(1) as client:
        arguments = (listener.getsockname()[1], save({"latent": latent}))
        client.apply(send, (*arguments, 5))
        before = time.process_time()
        latencies = client.apply(send, (*arguments, requests))
        spent = time.process_time() - before
    server.should_exit = True
    thread.join()
    encoding = _encoding_time(picture, requests)
    return {
        "answer, MB": len(png.encode(picture)) / 1e6,
        "requests": requests,
        "server's processor time, ms a request": 1000 * spent / requests,
        "  of which encoding, ms": 1000 * encoding,
        "  of which everything else, ms": 1000 * (spent / requests - encoding),
        "latency at the client, median, ms": 1000 * statistics.median(latencies),
        "latency at the client, largest, ms": 1000 * max(latencies),
    }


def send(port: int, body: bytes, count: int) -> list[float]:
    """Seconds that each of `count` requests took, over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", "/decode?seed=1", body, {"Content-Type": "application/x-safetensors"})
        answer = connection.getresponse()
        data = answer.read()
        seconds.append(time.perf_counter() - began)
        if answer.status != 200:
            raise SystemExit(f"The server answered {answer.status}: {data[:500]!r}")
    return seconds


def _encoding_time(picture: np.ndarray, rounds: int) -> float:
    """Processor seconds of one image on one thread."""
    before = time.process_time()
    for _ in range(rounds):
        png.encode(picture)
    return (time.process_time() - before) / rounds


if __name__ == "__main__":
    main()
