"""Create an engine's own virtual environment with pip, and record it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from memfit.engines.base import Engine
from memfit.engines.environment import Environment, environments_folder, store_environment
from memfit.runtime.child_process import dying_with_parent
from memfit.types.errors import RunError, UserError

OnLine = Callable[[str], None]


def install(engine: Engine, into: Path | None, on_line: OnLine) -> Environment:
    """Create the virtual environment of ``engine`` in the folder ``into`` (None: one named after the engine
    in `environments_folder`) and install the engine's requirements there. Record it as the engine's
    environment, and return the record. ``on_line`` is called with every line that venv and pip print, except
    empty ones.

    Raises UserError if the engine has no requirements, if the folder exists and is not empty, or if the
    record cannot be written. Raises RunError, with the last line printed, if venv or pip fails; what they
    have created stays, and must be removed before another try."""
    if not engine.requirements:
        raise UserError(
            f"engine {engine.name} needs no environment of its own: it runs in that of memfit",
            hint=f"install it with: {engine.install}" if engine.install else "there is nothing to install",
        )
    folder = (into or environments_folder() / engine.name).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not an empty folder",
            hint="remove it, or name another folder with --into",
        )
    start = time.perf_counter()
    _run([sys.executable, "-P", "-m", "venv", str(folder)], on_line)
    python = next(p for p in (folder / "bin/python", folder / "Scripts/python.exe") if p.exists())
    _run([str(python), "-P", "-m", "pip", "install", "--no-input", *engine.requirements], on_line)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run((str(python), "-c", code), capture_output=True, text=True, check=True).stdout
    environment = Environment(
        folder=str(folder),
        python=str(python),
        packages=packages.strip(),
        installed_bytes=_bytes(folder),
        took_s=time.perf_counter() - start,
    )
    store_environment(engine.name, environment)
    return environment


def _run(command: list[str], on_line: OnLine) -> None:
    last_line = ""
    with subprocess.Popen(
        dying_with_parent(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip():
                last_line = line.strip()
                on_line(last_line)
    if child.returncode:
        first_words = " ".join(command[:4])
        raise RunError(
            f"the environment was not installed: {first_words} ... failed with exit code "
            f"{child.returncode}; the last line of its output is: {last_line}"
        )


def _bytes(folder: Path) -> int:
    """Return the bytes of all files in ``folder`` and its subfolders, without symbolic links."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return sum(p.stat().st_size for p in files)
