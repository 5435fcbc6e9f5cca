"""Separate environments for engines whose dependencies conflict with memfit's, and the record of each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memfit.types import serialization
from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A virtual environment. ``folder``: its folder; ``python``: its interpreter; ``packages``: its
    site-packages; ``installed_bytes`` and ``took_s``: the disk space and the seconds that its creation
    took."""

    folder: str
    python: str
    packages: str
    installed_bytes: int
    took_s: float


def home() -> Path:
    """Return the default folder of environments and the folder of their records."""
    import platformdirs

    return platformdirs.user_data_path("memfit") / "engines"


def recorded(name: str) -> Environment | None:
    """Return the engine's recorded environment, whether or not it still exists. Return None if there is no
    record or it cannot be read."""
    try:
        return serialization.loads(
            Environment, _record(name).read_text(encoding="utf-8"), what=f"record of {name}"
        )
    except (OSError, UserError):
        return None


def record(name: str, made: Environment) -> None:
    """Write the record of the engine's environment."""
    path = _record(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(serialization.dumps(made, indent=2) + "\n", encoding="utf-8")


def _record(name: str) -> Path:
    return home() / f"{name}.json"
