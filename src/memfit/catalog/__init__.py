"""Facts as TOML, each with a source and a date: devices, links, hosts, networks, places, engines.

A fact that the tables do not have is None, or absent from a mapping.
"""

from memfit.catalog.load import (
    cpu_power,
    device,
    device_names,
    devices_of,
    efficiency,
    engine_facts,
    host,
    host_names,
    host_of,
    link,
    link_names,
    network,
    network_names,
    package_facts,
    place,
    place_names,
)
from memfit.catalog.machine_file import from_toml
from memfit.catalog.machine_spec import machine

__all__ = [
    "cpu_power",
    "device",
    "device_names",
    "devices_of",
    "efficiency",
    "engine_facts",
    "from_toml",
    "host",
    "host_names",
    "host_of",
    "link",
    "link_names",
    "machine",
    "network",
    "network_names",
    "package_facts",
    "place",
    "place_names",
]
