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
from loadtest.cost_tables import find_table
from loadtest.http_client import Client
from loadtest.keys import authorization, create_keys
from loadtest.scenario import Scenario
from loadtest.schedule import Capacity


@dataclass(frozen=True)
class Target:
    """A server under test."""

    url: str
    name: str  # shown in reports
    capacity: Capacity
    latents: Mapping[Size, tuple[int, ...]]  # latent shape [channels, height, width] by output size
    servers: tuple[processes.Process, ...] = ()  # processes that were started for the test, without nginx
    keys: Mapping[str, str] = field(default_factory=dict)  # API keys by name


async def inspect_server(
    url: str, devices: int = 1, table: SimulatedTable | None = None, keys: Mapping[str, str] | None = None
) -> Target:
    """Describe the server at `url` by its `/info`.

    Args:
        url: The server, http://host:port.
        devices: Number of its devices.
        table: Costs of its devices; by default the costs that the server measured.
        keys: API keys by name, if the server requires them.

    Raises:
        ConfigError: No decode server responds at `url`.
    """
    client, keys = Client(url), keys or {}
    try:
        _, body = await client.get("/info", authorization(keys))
        info = json.loads(body)
        channels = info["latent_space"]["channels"]
        latents = {Size(*size["output"]): (channels, *size["latent"]) for size in info["sizes"]}
        costs = _measured_costs(info["costs"]) if table is None else table.costs
        name = f"{info['device']} at {url}" if table is None else simulated_name(table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"No decode server responds at {url}: {error}.") from None
    finally:
        client.close()
    return Target(url, name, Capacity(costs, devices), latents, keys=keys)


def _measured_costs(costs: list[dict[str, Any]]) -> dict[Size, SimulatedCost]:
    """Return the costs of single images, without captions and encoding, from the list in `/info`."""
    stages: dict[Size, dict[str, Any]] = {}
    for cost in costs:
        if cost["batch"] == 1 and cost["stage"] not in ("caption", "encode"):
            stages.setdefault(Size(*cost["size"]), {})[cost["stage"]] = cost["seconds"]
    return {size: SimulatedCost(**seconds) for size, seconds in stages.items()}


def simulated_name(table: SimulatedTable) -> str:
    """Return the name of a simulated device for reports, e.g. `H200 (simulated, 4096x4096 estimated)`."""
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
    table, keys, flags = find_table(table_name), dict[str, str](), list(scenario.flags)
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
            yield replace(await inspect_server(server.url, devices, table, keys), servers=(server,))
            return
        servers = (await start(0), await start(1))
        proxy = await stack.enter_async_context(processes.nginx(servers, folder))
        target = await inspect_server(proxy.url, 2 * devices, table, keys)
        yield replace(target, name=f"2 x {target.name} behind nginx", servers=servers)
