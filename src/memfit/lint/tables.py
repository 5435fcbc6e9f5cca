"""The TOML tables of this package."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any


@functools.cache
def read_table(file: str) -> dict[str, Any]:
    """Return a TOML file of this package, by its path such as "options/deepspeed.toml", as a dictionary. Each
    file is read once; callers must not change the dictionary."""
    return tomllib.loads(resources.files("memfit.lint").joinpath(file).read_text(encoding="utf-8"))
