"""The list of public training scripts (scripts.toml), and the check that a script is unmodified."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

LIST = Path(__file__).with_name("scripts.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicScript:
    """A public training script at a commit, and how it is run here. `sha256` is of the script's file."""

    name: str
    kind: str
    use: Literal["development", "held_out"]
    repository: str  # owner/name on GitHub
    commit: str
    path: str  # in the repository
    sha256: str
    packages: tuple[str, ...]
    prepare: str  # a function of scripts/prepare.py
    folder: str  # in which the command runs, with placeholders
    command: str  # with placeholders
    module: str | None = None  # where a package installs the script
    ranks: int = 1
    torch_seed: int | None = None  # torch's first seed, for a script that sets none
    any_cifar: bool = False  # CIFAR-10 without torchvision's check of its files
    note: str = ""

    def file(self, sources: Path) -> Path:
        """Return the script's path: the installed module's, or the one in the checkout."""
        if self.module is None:
            return sources / self.repository.partition("/")[2] / self.path
        spec = importlib.util.find_spec(self.module)
        return Path(spec.origin if spec and spec.origin else self.module)

    def arguments(self, sources: Path, work: Path) -> list[str]:
        return shlex.split(self.command.format(sources=sources, work=work))


class ScriptError(Exception):
    """Raised if a script's file is missing or changed, or if the script ends before its second optimizer
    step."""


def load_scripts() -> dict[str, PublicScript]:
    """Return the listed scripts by name. Unknown keys in the list raise pydantic's ValidationError."""
    rows = tomllib.loads(LIST.read_text(encoding="utf-8"))["script"]
    scripts = TypeAdapter(list[PublicScript]).validate_python(rows)
    return {s.name: s for s in scripts}


def check_unmodified(script: PublicScript, sources: Path) -> None:
    """Raise ScriptError unless the script's file has the listed SHA-256."""
    path = script.file(sources)
    if not path.is_file():
        raise ScriptError(f"no file {path}: check out {script.repository} at {script.commit}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != script.sha256:
        raise ScriptError(f"{path} differs from {script.repository} at {script.commit}")
