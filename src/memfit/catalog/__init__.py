"""Facts as TOML, each with a source and a date: devices, places, hosts, engines. Unknown stays unknown."""

from memfit.catalog.load import (
    cpu_power,
    device,
    device_names,
    efficiency,
    engine_facts,
    link,
    machine,
    network,
    network_names,
    place,
    place_names,
)
from memfit.catalog.user import from_toml

__all__ = [
    "cpu_power", "device", "device_names", "efficiency", "engine_facts", "from_toml", "link", "machine",
    "network", "network_names", "place", "place_names",
]  # fmt: skip
