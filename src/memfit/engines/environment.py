"""Separate environments for engines whose dependencies conflict with memfit's, and the record of each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memfit.files.replace import write_whole
from memfit.types import serialization
from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An engine's virtual environment. ``folder``: path of its folder; ``python``: path of its interpreter;
    ``packages``: path of its site-packages folder; ``installed_bytes``: total size of its files when it had
    been created; ``took_s``: seconds that its creation took."""

    folder: str
    python: str
    packages: str
    installed_bytes: int
    took_s: float


def environments_folder() -> Path:
    """Return the folder "memfit/engines" in the user's data folder. It holds a record of each engine's
    environment. Environments are also created there, unless the user names another folder."""
    import platformdirs

    return platformdirs.user_data_path("memfit") / "engines"


def load_environment(name: str) -> Environment | None:
    """Return the environment of the engine ``name`` as its record describes it. It is not checked whether the
    environment still exists. Return None if there is no record or it cannot be read."""
    try:
        return serialization.loads(
            Environment, _record(name).read_text(encoding="utf-8"), what=f"record of {name}"
        )
    except (OSError, UserError):
        return None


def store_environment(name: str, environment: Environment) -> None:
    """Write ``environment`` as the record of the engine ``name``, in place of any earlier record. Raises
    UserError if the file cannot be written."""
    text = f"{serialization.dumps(environment, indent=2)}\n"
    write_whole(_record(name), text.encode(), make_folder=True)


def _record(name: str) -> Path:
    return environments_folder() / f"{name}.json"
