"""The cost tables of simulated devices that ship with the load generator."""

from __future__ import annotations

from pathlib import Path

from engines.runtime.simulated import SimulatedTable, load_table

TABLES = Path(__file__).parent / "tables"


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
