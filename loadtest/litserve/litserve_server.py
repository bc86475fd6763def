"""The simulated engine and the PNG encoder behind LitServe, for `loadtest.litserve.__main__`.

Written to LitServe's advantage where there is a choice: bodies as raw bytes rather than JSON, no checks of the input,
strips of a picture encoded by as many threads as the decode server uses.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import litserve
from fastapi import Body, Response
from safetensors.torch import load

from engines.pid.sampler import step_indices
from engines.runtime.protocol import Rows, Sample
from engines.runtime.simulated import SimulatedRuntime
from loadtest.simulated_server import find_table
from server.images import png


class DecodeAPI(litserve.LitAPI):
    """Whole-request batching: a batch decodes and encodes from begin to end before the next one starts."""

    def __init__(self, table: str, pre_encoded: bool) -> None:
        self._table = find_table(table)
        self._pre_encoded = pre_encoded
        super().__init__(max_batch_size=self._table.max_batch, api_path="/decode")

    def setup(self, device: str) -> None:
        self._runtime = SimulatedRuntime.from_table(self._table)
        self._runtime.warm_up()
        self._size = self._runtime.info.sizes[0]
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        png.warm_up()
        picture = self.predict([Sample(None, self._size)])[0].pixels  # type: ignore[arg-type]  # no latent is looked at
        self._encoded = png.encode(picture, compression="none")

    def decode_request(self, request: Annotated[bytes, Body()]) -> Sample:
        return Sample(load(request)["latent"], self._size)

    def batch(self, inputs: list[Sample]) -> list[Sample]:
        return inputs

    def predict(self, x: list[Sample] | Sample) -> list[Rows]:
        samples = x if isinstance(x, list) else [x]
        slots = [self._runtime.start(sample) for sample in samples]
        for index in step_indices(4):
            self._runtime.step(slots, [index] * len(slots))
        pictures: list[Rows] = []
        for slot in slots:
            pictures.append(self._runtime.finish(slot))
            self._runtime.release(slot)
        return pictures

    def unbatch(self, output: list[Rows]) -> list[Rows]:
        return output

    def encode_response(self, output: Rows) -> Response:
        data = self._encoded if self._pre_encoded else self._encode(output.pixels)
        return Response(data, media_type="image/png")

    def _encode(self, pixels: png.Bytes) -> bytes:
        height, width, _ = pixels.shape
        bounds = png.strip_bounds(width, height)
        strips = list(
            self._pool.map(lambda b: png.encode_strip(pixels[b[0] : b[1]], pixels[b[0] - 1] if b[0] else None), bounds)
        )
        tail = png.png_tail(strip.checksum for strip in strips)
        return b"".join((png.png_head(width, height), *(strip.data for strip in strips), tail))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", default="zero")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pre-encoded", action="store_true")
    parser.add_argument("--fast-queue", action="store_true", help="LitServe's ZeroMQ transport")
    options = parser.parse_args()
    api = DecodeAPI(options.table, options.pre_encoded)
    service = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=120, fast_queue=options.fast_queue)
    service.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
