"""A throw-away environment for each peer: its own packages, with this interpreter's packages behind them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

_FILE = tomllib.loads((Path(__file__).parent / "peers.toml").read_text(encoding="utf-8"))
CAVEATS: list[str] = _FILE["caveats"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """peers.toml says what the fields are."""

    name: str
    says: str
    called: str
    packages: list[str] = dataclasses.field(default_factory=list)
    source: str = ""
    states: bool = False


PEERS = tuple(Peer(**told) for told in _FILE["peer"])


def python_of(peer: Peer, folder: Path) -> str:
    """The interpreter that has the peer, made at the first call. Raises subprocess.CalledProcessError."""
    if not peer.packages:
        return sys.executable
    home = folder / peer.name
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True, text=True)
        own = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
        (Path(own) / "behind.pth").write_text(sysconfig.get_path("purelib"))
        env = {**os.environ, "DS_BUILD_OPS": "0"}
        for package in ("setuptools", "wheel", *peer.packages):  # some are built here, beside torch
            command = [str(python), "-m", "pip", "install", "-q", "--no-build-isolation", package]
            subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        done.touch()
    return str(python)
