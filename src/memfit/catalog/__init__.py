"""Facts as TOML, each with a source and a date: devices, places, hosts. Unknown stays unknown."""

from memfit.catalog.load import cpu_power, device, device_names, machine, place, place_names
from memfit.catalog.user import from_toml

__all__ = ["cpu_power", "device", "device_names", "from_toml", "machine", "place", "place_names"]
