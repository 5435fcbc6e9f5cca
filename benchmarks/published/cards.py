"""Which card of the catalog a row means: ``A100-80GB``, ``8x NVIDIA A100 (40G)``, ``DGX H100``."""

from __future__ import annotations

import contextlib
import re

from memfit.catalog.load import device, device_names
from memfit.types.errors import UserError
from memfit.types.machine import Device
from published.quantities import GIB


def card(name: str, memory_gb: float = 0.0) -> Device | None:
    """The catalog's card of that name; where several have it, the one whose memory is nearest to what the
    name says, else to ``memory_gb``, and the one with NVLink unless the name says PCIe. None: no such card.

    China's A800 and H800 have slower links, nothing else.
    """
    known = name.replace("A800", "A100").replace("H800", "H100")
    for spelled in (known, known.split("-")[0] + "-SXM", known.split("-")[0]):
        with contextlib.suppress(UserError):
            return device(spelled)
    found = _series(known)
    if not found:
        return None
    stated = re.search(r"(\d+)\s*(?:GB|GiB|G)\b", known, re.IGNORECASE)
    wanted = float(stated[1]) if stated else memory_gb
    form = re.search(r"pcie|nvl\b", known.lower())
    asked = [d for d in found if form and form[0] in d.name.lower()]
    fits = asked or [d for d in found if _usual(d)] or found
    if not wanted:
        return fits[-1]  # the catalog has the larger memory last
    return min(fits, key=lambda d: abs((d.memory_bytes.value if d.memory_bytes else 0.0) / GIB - wanted))


def _usual(card: Device) -> bool:
    return not re.search("pcie|nvl$|hbm2e", card.name.lower())


def _series(name: str) -> list[Device]:
    """Devices of the longest series that is named, not inside another's name: L40S is no L4."""
    text = re.sub(_BRANDS, " ", name.lower())
    series: dict[str, list[str]] = {}
    for full in device_names():
        series.setdefault(_series_of(full), []).append(full)
    named = [s for s in series if re.search(rf"(?<![a-z\d]){_spaced(s)}(?![a-z\d])(?!\s*ti\b)", text)]
    best = max(named, key=len, default="")
    return [device(full) for full in series.get(best, ())]


# Brands, boards and counts are written together with the name: ``dgxa100``, ``8xH100``, ``A100x8``.
_BRANDS = r"nvidia|amd|tesla|geforce|quadro|instinct|rtx|dgx|hgx|\b\d+\s*[x×*]\s*(?=[a-z0-9])|[x×*]\s*\d+\b"


def _series_of(full: str) -> str:
    short = re.sub(r"-(sxm\d?|pcie|nvl|\d+gb|hbm\w+)", "", full.lower())
    return re.sub("^rtx-?", "", short)


def _spaced(series: str) -> str:
    return r"[\s_-]*".join(map(re.escape, series.split("-")))
