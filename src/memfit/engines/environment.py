"""Environments of their own, for engines whose dependencies clash with memfit's, each with a record."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memfit.types import serialization
from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A virtual environment. ``packages``: its site-packages; ``installed_bytes`` and ``took_s``: what making
    it cost."""

    folder: str
    python: str
    packages: str
    installed_bytes: int
    took_s: float


def home() -> Path:
    """Where environments and their records are, unless the user says otherwise."""
    import platformdirs

    return platformdirs.user_data_path("memfit") / "engines"


def recorded(name: str) -> Environment | None:
    """The engine's environment, whether it is still there or not; None: none was made, or nobody can read
    of it."""
    try:
        return serialization.loads(
            Environment, _record(name).read_text(encoding="utf-8"), what=f"record of {name}"
        )
    except (OSError, UserError):
        return None


def record(name: str, made: Environment) -> None:
    path = _record(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(serialization.dumps(made, indent=2) + "\n", encoding="utf-8")


def _record(name: str) -> Path:
    return home() / f"{name}.json"
