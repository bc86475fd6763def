"""`python -m loadtest.simulated_server --table gb200`: the decode server on simulated devices; accepts all its flags.

Only the devices are simulated. HTTP, scheduling, encoding, metrics and signals are those of the server.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from engines.captions.simulated import SimulatedTextEncoder
from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError
from engines.runtime.protocol import Rows, Runtime, RuntimeInfo
from engines.runtime.simulated import SimulatedRuntime, SimulatedTable
from loadtest.cost_tables import TABLES, decoder_argument, decoder_tables, find_table, table_names
from server import logs
from server.command_line import read_settings
from server.images import png
from server.images.encoder import Encoder
from server.images.encoding import EncodeProgress, Encoding, Rank, Report, ignore_progress
from server.main import serve
from server.process.listen import listening
from server.stream import ImageStream
from server.swaps import FixedDecoders

_CHUNK = 512 * 1024  # bytes


def simulated_devices(
    table: SimulatedTable, count: int = 1, slots: int | None = None, max_pixels: int | None = None
) -> dict[str, Runtime]:
    """Return `count` simulated devices with the costs of `table`, by name."""
    return {
        f"simulated:{index}": SimulatedRuntime.from_table(table, slots=slots, max_pixels=max_pixels)
        for index in range(count)
    }


def simulated_text_encoder(
    seconds: float | None, max_batch: int, decoders: Mapping[str, RuntimeInfo]
) -> SimulatedTextEncoder | None:
    """Return a text encoder for simulated decoders, or None if `seconds` is None.

    Args:
        seconds: Time that it takes for a batch of prompts.
        max_batch: Most prompts in a batch.
        decoders: Properties of the decoders, whose captions all have the same shape.
    """
    if seconds is None:
        return None
    info = next(iter(decoders.values()))
    return SimulatedTextEncoder(info.caption_tokens, info.caption_width, seconds, max_batch)


class PreEncoder(Encoder):
    """Encoder that responds with a PNG encoded once per size, to measure the server without the cost of encoding.

    It encodes other formats as usual.
    """

    def __init__(self, threads: int, before_strip: Callable[[], None] = lambda: None) -> None:
        """Create an encoder with the signature of `Encoder`."""
        super().__init__(threads, before_strip)
        self._chunks: dict[tuple[int, ...], list[bytes]] = {}  # by the image's shape

    def encode(
        self,
        rows: Rows,
        stream: ImageStream,
        encoding: Encoding,
        rank: Rank = (math.inf, 0),
        report: Report = ignore_progress,
    ) -> None:
        """Send the stored PNG at once; the first image of a size is encoded on the calling thread."""
        if encoding.format != "png":
            super().encode(rows, stream, encoding, rank, report)
            return
        for chunk in self._encoded(rows):
            stream.push(chunk)
        stream.end()
        rows.close()
        report(EncodeProgress(begun=1.0, done=1.0, ended=True))

    def measure(self, rows: Rows) -> None:
        """Encode `rows` if no image of their size was encoded yet, and close them."""
        self._encoded(rows)
        rows.close()

    def _encoded(self, rows: Rows) -> list[bytes]:
        shape = rows.pixels.shape
        if shape not in self._chunks:
            data = png.encode(rows.pixels, compression="none")
            self._chunks[shape] = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
        return self._chunks[shape]


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal arrives; return the exit status."""
    chosen, flags = _parser().parse_known_args(arguments)
    try:
        tables = decoder_tables(find_table(chosen.table), chosen.simulated_decoder)
        seconds, max_batch = chosen.simulated_caption_seconds, chosen.simulated_caption_batch
        if not (0 <= (seconds or 0) < math.inf and max_batch >= 1):
            raise ConfigError(
                "--simulated-caption-seconds must be at least 0, and --simulated-caption-batch at least 1."
            )
        settings = read_settings(["--bundle", str(TABLES), *flags])  # required, but no bundle is opened
        logs.configure(settings.log_level, settings.log_format)
        options = chosen.simulated_devices, settings.device_slots, settings.max_pixels
        runtimes = {name: simulated_devices(table, *options) for name, table in tables.items()}
        encoder = PreEncoder if chosen.pre_encoded else Encoder
        open_captions = partial(simulated_text_encoder, seconds, max_batch)
        with listening(settings.address) as listener:
            return serve(settings, listener, FixedDecoders(runtimes), encoder, open_captions=open_captions)
    except PidError as error:
        logs.print_error(f"simulated server: {error}")
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells report it


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m loadtest.simulated_server",
        allow_abbrev=False,
        usage="%(prog)s [options] [options of python -m server]",
        description="Run the decode server on simulated devices. Everything else is real: HTTP, scheduling, encoding, "
        "metrics and signals.",
        epilog="All options of python -m server are accepted as well; see its --help.",
    )
    tables = ", ".join(table_names())
    parser.add_argument("--table", default="gb200", help=f"cost table: {tables}, or a JSON file (default: %(default)s)")
    parser.add_argument(
        "--simulated-devices", type=int, default=1, metavar="COUNT", help="devices to simulate (default: %(default)s)"
    )
    parser.add_argument(
        "--simulated-decoder",
        type=decoder_argument,
        action="append",
        default=[],
        metavar="NAME=CHANNELS:COST",
        help="a decoder for latents with CHANNELS channels, with COST times the costs of the table; several times for "
        "several (default: one decoder with the costs and latents of the table)",
    )
    parser.add_argument(
        "--simulated-caption-seconds",
        type=float,
        metavar="SECONDS",
        help="add a text encoder that takes so long for a batch of prompts (default: no text encoder)",
    )
    parser.add_argument(
        "--simulated-caption-batch",
        type=int,
        default=1,
        metavar="COUNT",
        help="prompts that the text encoder encodes at once (default: %(default)s)",
    )
    parser.add_argument("--pre-encoded", action="store_true", help="respond with PNGs that are encoded only once")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
