"""`python -m loadtest.simulated_server --table gb200`: the decode server on simulated devices, any server flag beside.

Everything but the devices is the server itself: HTTP, scheduling, encoding, metrics, signals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.errors import PidError
from engines.runtime.protocol import Rows, Runtime
from engines.runtime.simulated import SimulatedRuntime, SimulatedTable, load_table
from server import logs
from server.images import png
from server.images.encoder import Encoder, Encoding
from server.main import serve
from server.settings import read_settings
from server.stream import ImageStream

TABLES = Path(__file__).parent / "tables"
_CHUNK = 512 * 1024  # bytes


def find_table(name: str) -> SimulatedTable:
    """A table of this folder by its name (gb200), or the file at a path. Raises ConfigError."""
    known = TABLES / f"{name}.json"
    return load_table(known if known.is_file() else Path(name))


def simulated_devices(table: SimulatedTable, count: int = 1, slots: int | None = None) -> dict[str, Runtime]:
    return {f"simulated:{index}": SimulatedRuntime.from_table(table, slots=slots) for index in range(count)}


class PreEncoder(Encoder):
    """Answers with a stored PNG made once for each size, for measuring the server without its encoder."""

    def __init__(self, threads: int, before_strip: Callable[[], None] = lambda: None) -> None:
        super().__init__(threads, before_strip)
        self._encoded: dict[tuple[int, ...], list[bytes]] = {}  # in pieces, by the picture's shape

    def encode(self, rows: Rows, answer: ImageStream, encoding: Encoding) -> None:
        for piece in self._pieces(rows):
            answer.push(piece)
        answer.end()
        rows.close()

    def measure(self, rows: Rows) -> None:
        self._pieces(rows)
        rows.close()

    def _pieces(self, rows: Rows) -> list[bytes]:
        shape = rows.pixels.shape
        if shape not in self._encoded:
            data = png.encode(rows.pixels, compression="none")
            self._encoded[shape] = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
        return self._encoded[shape]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.simulated_server", description=__doc__, allow_abbrev=False, add_help=True
    )
    tables = ", ".join(sorted(path.stem for path in TABLES.glob("*.json")))
    parser.add_argument("--table", default="gb200", help=f"cost table: {tables}, or a file")
    parser.add_argument("--simulated-devices", type=int, default=1, metavar="N", help="how many of them")
    parser.add_argument("--pre-encoded", action="store_true", help="answer with PNGs that were encoded at the start")
    chosen, flags = parser.parse_known_args(arguments)
    try:
        table = find_table(chosen.table)
        settings = read_settings(["--bundle", str(TABLES), *flags])  # no bundle is opened
        logs.configure(settings.log_level)
        devices = simulated_devices(table, chosen.simulated_devices, settings.slots)
        return serve(settings, devices, PreEncoder if chosen.pre_encoded else Encoder)
    except PidError as error:
        print(f"simulated server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as a shell has it for SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
