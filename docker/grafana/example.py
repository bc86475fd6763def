"""Draw the dashboard of a simulated server under load: `python -m docker.grafana.example`, or `make dashboard`.

Starts a server on a simulated GB200 and a Prometheus that scrapes it, sends the load in load.toml, and draws the
dashboard. This takes ten minutes. Needs the `dev` extra and, on Debian: apt-get install prometheus.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from matplotlib.figure import Figure

from docker.grafana.query import PrometheusClient
from docker.grafana.render import DPI, draw
from docker.prometheus.local import write_configuration
from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError
from loadtest.processes import Process, free_port
from loadtest.runner import run_scenario
from loadtest.scenario import Scenario, load_scenario
from loadtest.target import simulated_target

LOAD = Path(__file__).with_name("load.toml")
ROWS = ("Overview", "Traffic", "Latency", "Queue")
TITLE = "Simulated GB200, images of 2048×2048: load rising from 0.2 to 1.8 times the capacity in ten minutes"
_SCRAPE_SECONDS = 2


async def measure(scenario: Scenario, folder: Path) -> tuple[Figure, list[str]]:
    """Run a load, with temporary files in `folder`; return the dashboard and the titles of panels without data.

    Raises:
        ConfigError: Prometheus is not installed, or it or the server does not start.
    """
    async with simulated_target(scenario, "gb200", 1, folder) as target:
        prometheus = _prometheus(folder, {"gb200": target.url.removeprefix("http://")})
        try:
            await prometheus.start("/-/ready")
            began = time.time()
            report = await run_scenario(scenario, target, progress=sys.stderr.isatty())
            print(report.table())
            return draw(PrometheusClient(prometheus.url, time.time() - began), TITLE, ROWS)
        finally:
            await prometheus.stop()


def _prometheus(folder: Path, servers: dict[str, str]) -> Process:
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError("Prometheus is not installed. Install it, on Debian with: apt-get install prometheus.")
    config, port = folder / "prometheus.yml", free_port()
    write_configuration(config, servers, _SCRAPE_SECONDS)
    listen, data = f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={folder / 'data'}"
    return Process([program, f"--config.file={config}", listen, data], port, folder / "prometheus.log")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status, 1 if a panel has no data and 2 if the run was impossible."""
    parser = ArgumentParser(
        prog="python -m docker.grafana.example",
        usage="%(prog)s [options]",
        description="Draw the dashboard of a simulated server while its load rises. Takes ten minutes.",
    )
    output = Path("dashboard.png")
    parser.add_argument(
        "--output", type=Path, default=output, metavar="FILE", help="PNG file to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            figure, empty = asyncio.run(measure(load_scenario(LOAD), Path(folder)))
    except (PidError, httpx.HTTPError, ValueError) as error:
        print(f"example: {error}", file=sys.stderr)
        return 2
    figure.savefig(options.output, dpi=DPI)
    print(f"wrote {options.output}")
    if empty:
        print(f"These panels have no data: {', '.join(empty)}.", file=sys.stderr)
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
