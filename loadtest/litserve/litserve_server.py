"""The simulated engine and the PNG encoder behind LitServe, for the comparison.

Choices favour LitServe: bodies are raw bytes instead of JSON, the input is not validated, and as many threads encode
the strips of an image as in the decode server.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import litserve
from fastapi import Body, Response
from safetensors.torch import load

from engines.cli import ArgumentParser
from engines.pid.sampler import step_indices
from engines.runtime.protocol import Rows, Sample
from engines.runtime.simulated import SimulatedRuntime
from loadtest.benchmarks import parallel_png
from loadtest.cost_tables import find_table
from server.images import png


class DecodeAPI(litserve.LitAPI):
    """Whole-request batching: a batch is decoded and encoded completely before the next one starts."""

    def __init__(self, table: str, pre_encoded: bool) -> None:
        """Choose the cost table by its name, and whether to respond with a PNG encoded only once."""
        self._table = find_table(table)
        self._pre_encoded = pre_encoded
        super().__init__(max_batch_size=self._table.max_batch, api_path="/decode")

    def setup(self, device: str) -> None:
        """Create and warm up the runtime and the encoder."""
        self._runtime = SimulatedRuntime.from_table(self._table)
        self._runtime.warm_up()
        self._size = self._runtime.info.sizes[0]
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        png.warm_up()
        pixels = self.predict([Sample(None, self._size)])[0].pixels  # type: ignore[arg-type]  # the latent is not read
        self._stored = png.encode(pixels, compression="none")

    def decode_request(self, request: Annotated[bytes, Body()]) -> Sample:
        """Parse the latent."""
        return Sample(load(request)["latent"], self._size)

    def batch(self, inputs: list[Sample]) -> list[Sample]:
        """Return the samples as they are; the runtime batches them."""
        return inputs

    def predict(self, x: list[Sample] | Sample) -> list[Rows]:
        """Decode a batch."""
        samples = x if isinstance(x, list) else [x]
        slots = [self._runtime.start(sample) for sample in samples]
        for index in step_indices(4):
            self._runtime.step(slots, [index] * len(slots))
        images: list[Rows] = []
        for slot in slots:
            images.append(self._runtime.finish(slot))
            self._runtime.release(slot)
        return images

    def unbatch(self, output: list[Rows]) -> list[Rows]:
        """Return the images as they are."""
        return output

    def encode_response(self, output: Rows) -> Response:
        """Encode an image as PNG."""
        data = self._stored if self._pre_encoded else parallel_png.encode(self._pool, output.pixels)
        return Response(data, media_type="image/png")


def main() -> None:
    """Serve until a signal arrives."""
    parser = ArgumentParser(prog="python -m loadtest.litserve.litserve_server", description=__doc__)
    parser.add_argument("--table", default="zero", help="cost table (default: %(default)s)")
    parser.add_argument("--port", type=int, required=True, help="port to listen on (required)")
    parser.add_argument("--pre-encoded", action="store_true", help="respond with a PNG that is encoded only once")
    parser.add_argument("--fast-queue", action="store_true", help="use LitServe's ZeroMQ transport")
    options = parser.parse_args()
    api = DecodeAPI(options.table, options.pre_encoded)
    service = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=120, fast_queue=options.fast_queue)
    service.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
