"""The server under test: a running one, or one started on simulated devices."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost, SimulatedTable
from engines.size import Size
from loadtest import processes
from loadtest.cost_tables import decoder_tables, find_table, output_costs
from loadtest.http_client import Client
from loadtest.keys import authorization, create_keys
from loadtest.scenario import Scenario
from loadtest.schedule import Capacity
from server.scheduling.costs import Output


@dataclass(frozen=True)
class Target:
    """A server under test."""

    url: str
    name: str  # shown in reports
    capacity: Capacity
    latents: Mapping[Output, tuple[int, ...]]  # latent shapes [channels, height, width]
    servers: tuple[processes.Process, ...] = ()  # processes that were started for the test, without nginx
    keys: Mapping[str, str] = field(default_factory=dict)  # API keys by name


async def inspect_server(
    url: str,
    devices: int = 1,
    tables: Mapping[str, SimulatedTable] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Target:
    """Describe the server at `url` by its `/info`.

    Args:
        url: The server, http://host:port.
        devices: Number of its devices.
        tables: Cost tables of its decoders, by name; by default the costs that the server measured.
        keys: API keys by name, if the server requires them.

    Raises:
        ConfigError: No decode server responds at `url`.
    """
    client, keys = Client(url), keys or {}
    try:
        _, body = await client.get("/info", authorization(keys))
        info = json.loads(body)
        latents = {
            Output(decoder["name"], Size(*size["output"])): (decoder["latent_space"]["channels"], *size["latent"])
            for decoder in info["decoders"]
            for size in decoder["sizes"]
        }
        costs = _measured_costs(info["costs"]) if tables is None else output_costs(tables)
        device = info["decoders"][0]["device"]
        name = f"{device} at {url}" if tables is None else simulated_name(next(iter(tables.values())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"No decode server responds at {url}: {error}.") from None
    finally:
        client.close()
    return Target(url, name, Capacity(costs, devices), latents, keys=keys)


def _measured_costs(costs: list[dict[str, Any]]) -> dict[Output, SimulatedCost]:
    """Return the costs of single images, without captions and encoding, from the list in `/info`."""
    stages: dict[Output, dict[str, Any]] = {}
    for cost in costs:
        if cost["batch"] == 1 and cost["size"] is not None and cost["tile"] is None and cost["stage"] != "encode":
            output = Output(cost["decoder"], Size(*cost["size"]))
            stages.setdefault(output, {})[cost["stage"]] = cost["seconds"]
    return {output: SimulatedCost(**seconds) for output, seconds in stages.items()}


def simulated_name(table: SimulatedTable) -> str:
    """Return the name of a simulated device for reports, e.g. `GB200 (simulated, 3072x3072 estimated)`."""
    estimated = [str(size) for size, cost in table.costs.items() if cost.estimated]
    sizes = " and ".join(estimated) + " " if len(estimated) < len(table.costs) else ""
    return f"{table.name} (simulated{f', {sizes}estimated' if estimated else ''})"


@contextlib.asynccontextmanager
async def running_target(scenario: Scenario, url: str, devices: int, keys: Mapping[str, str]) -> AsyncIterator[Target]:
    """Yield the running server at `url` as the target of `scenario`; `keys` are API keys by name."""
    if scenario.rolling_restart is not None:
        raise ConfigError("A rolling restart replaces the servers under test; run it with --simulate.")
    if scenario.pauses:
        raise ConfigError("Pauses stop the server under test; run this scenario with --simulate.")
    yield await inspect_server(url, devices, keys=keys)


@contextlib.asynccontextmanager
async def simulated_target(scenario: Scenario, table_name: str, devices: int, folder: Path) -> AsyncIterator[Target]:
    """Run a server on simulated devices, or two behind nginx for a rolling restart, for the duration of the block.

    If the scenario names API keys, they are written to a file in `folder`, and the server requires them.
    """
    tables = decoder_tables(find_table(table_name), scenario.decoders)
    keys, flags = dict[str, str](), scenario.server_flags
    if scenario.key_names:
        keys = create_keys(folder / "api-keys", scenario.key_names)
        flags += ["--api-keys", str(folder / "api-keys")]
    async with contextlib.AsyncExitStack() as stack:

        async def start(number: int) -> processes.Process:
            log = folder / f"server-{number}.log"
            server = processes.simulated_server(table_name, devices, flags, log)
            return await stack.enter_async_context(processes.started(server))

        if scenario.rolling_restart is None:
            server = await start(0)
            yield replace(await inspect_server(server.url, devices, tables, keys), servers=(server,))
            return
        servers = (await start(0), await start(1))
        proxy = await stack.enter_async_context(processes.nginx(servers, folder))
        target = await inspect_server(proxy.url, 2 * devices, tables, keys)
        yield replace(target, name=f"2 x {target.name} behind nginx", servers=servers)
