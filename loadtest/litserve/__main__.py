"""`python -m loadtest.litserve`: compare this server with LitServe, on the same engine, encoder and client."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError
from loadtest.documents import to_document
from loadtest.litserve.compare import Options, compare
from loadtest.litserve.table import KEYS, table


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; return the exit status."""
    chosen = _parser().parse_args(arguments)
    options = Options(chosen.rounds, chosen.seconds, chosen.minutes, chosen.concurrency, chosen.pin)
    folder = chosen.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if find_spec("litserve") is None:
            raise ConfigError("LitServe is not installed. Install it with: pip install '.[litserve]'.")
        measured, notes = asyncio.run(compare(options, folder))
    except PidError as error:
        print(f"litserve: {error}", file=sys.stderr)
        return 2
    document = {"notes": notes, "measured": to_document(measured, KEYS)}
    (folder / "litserve.json").write_text(json.dumps(document, indent=2) + "\n")
    print("\n".join([table(measured), *notes]))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m loadtest.litserve",
        usage="%(prog)s [options]",
        description="Compare this server with LitServe, on the same engine, encoder and client.",
    )
    add = parser.add_argument
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="COUNT",
        help="undisturbed rounds per server (default: %(default)s)",
    )
    add(
        "--seconds",
        type=float,
        default=3.0,
        help="full load per round; half load lasts twice as long (default: %(default)g)",
    )
    add(
        "--minutes",
        type=float,
        default=9.0,
        help="time limit, after which the rounds so far are reported (default: %(default)g)",
    )
    add(
        "--concurrency",
        type=int,
        default=8,
        metavar="COUNT",
        help="clients at full load (default: %(default)s)",
    )
    add("--pin", action="store_true", help="pin the client to one core and the servers to the others (Linux)")
    add(
        "--output",
        type=Path,
        default=Path("loadtest-report"),
        metavar="DIR",
        help="directory for the results and logs (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
