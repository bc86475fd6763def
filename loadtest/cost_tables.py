"""The cost tables of simulated devices that ship with the load generator, and the decoders on such devices."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost, SimulatedTable, load_table
from server.scheduling.costs import Output

TABLES = Path(__file__).parent / "tables"
ONLY_DECODER = "simulated"  # name of the decoder of devices that have one

_DECODER = re.compile(r"(.+)=(.+):(.+)")


class SimulatedDecoder(BaseModel):
    """One of several decoders on the same simulated devices, defined relative to their cost table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    latent_channels: Annotated[int, Field(ge=1)]
    cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # factor for all times of the table

    @classmethod
    def parse(cls, text: str) -> SimulatedDecoder:
        """Read NAME=CHANNELS:COST, e.g. sdxl=4:0.6.

        Raises:
            ValueError: The text has another form, or a value is invalid.
        """
        match = _DECODER.fullmatch(text)
        try:
            if match:
                name, channels, cost = match.groups()
                return cls.model_validate({"name": name, "latent_channels": channels, "cost": cost})
        except ValidationError:
            pass
        raise ValueError(f"{text!r} is not a simulated decoder; write NAME=CHANNELS:COST, as in sdxl=4:0.6")

    def __str__(self) -> str:
        return f"{self.name}={self.latent_channels}:{self.cost}"

    def table(self, table: SimulatedTable) -> SimulatedTable:
        """Return the cost table of this decoder on the devices of `table`."""
        costs = {size: _scaled(cost, self.cost) for size, cost in table.costs.items()}
        restore = self.cost * table.restore
        return replace(table, costs=costs, latent_channels=self.latent_channels, restore=restore)


def decoder_argument(text: str) -> SimulatedDecoder:
    """Parse a simulated decoder as the `type` of an argparse argument."""
    try:
        return SimulatedDecoder.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _scaled(cost: SimulatedCost, factor: float) -> SimulatedCost:
    times = {name: factor * getattr(cost, name) for name in ("condition", "step", "finish", "preview")}
    return replace(cost, **times)


def table_names() -> list[str]:
    """Return the names of the shipped tables, sorted."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


def find_table(name: str) -> SimulatedTable:
    """Load a shipped table by its name, e.g. gb200, or any table by its path.

    Raises:
        ConfigError: The file cannot be read or is not a cost table.
    """
    shipped = TABLES / f"{name}.json"
    return load_table(shipped if shipped.is_file() else Path(name))


def decoder_tables(table: SimulatedTable, decoders: Sequence[SimulatedDecoder] = ()) -> dict[str, SimulatedTable]:
    """Return the cost table of each decoder on the devices of `table`, by name; without `decoders`, of the only one.

    Raises:
        ConfigError: Two decoders have the same name.
    """
    tables = {decoder.name: decoder.table(table) for decoder in decoders}
    if len(tables) < len(decoders):
        raise ConfigError("Two simulated decoders have the same name.")
    return tables or {ONLY_DECODER: table}


def output_costs(tables: Mapping[str, SimulatedTable]) -> dict[Output, SimulatedCost]:
    """Return the costs of decoders and sizes from the tables of decoders."""
    return {Output(name, size): cost for name, table in tables.items() for size, cost in table.costs.items()}


def output_latents(tables: Mapping[str, SimulatedTable]) -> dict[Output, tuple[int, int, int]]:
    """Return the latent shapes [channels, height, width] of decoders and sizes from the tables of decoders."""
    return {Output(name, size): table.latent_shape(size) for name, table in tables.items() for size in table.costs}
