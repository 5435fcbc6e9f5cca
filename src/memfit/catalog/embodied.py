"""The CO2 equivalent of making an accelerator, estimated from its die area and memory."""

from __future__ import annotations

from memfit.catalog.tables import facts, table
from memfit.types.machine import Fact


def estimated_kg(device: str) -> Fact | None:
    """Return an estimate of the CO2 equivalent of making the device, in kg, with its range: a constant for
    the board plus terms for die area and memory (embodied.toml). None if embodied.toml does not have the
    device.

    ``device``: its exact name in the catalog. The estimate is marked as assumed; its source names the method.
    """
    data = table("embodied.toml")
    row = data["devices"].get(device)
    if row is None:
        return None
    area_cm2, memory_gb = row[0] / 100, float(row[1])
    method = facts(data["method"], data["sources"], tuple(data["method"]))
    board, die, memory, high = (
        method[key] for key in ("board_kg", "die_kg_per_cm2", "memory_kg_per_gb", "high_ratio")
    )
    value = board.value + die.value * area_cm2 + memory.value * memory_gb
    return Fact(
        value=value,
        low=board.value + (die.low or 0.0) * area_cm2 + (memory.low or 0.0) * memory_gb,
        high=value * high.value,
        source=f"estimated: {board.value:g} kg of board, {area_cm2:g} cm2 of dies at {die.value:g} kg, "
        f"{memory_gb:g} GB at {memory.value:g} kg; {die.source}; high: {high.source}",
        date=die.date,
        kind="assumed",
    )
