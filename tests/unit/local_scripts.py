"""Scripts of the tests as if they were public ones."""

from __future__ import annotations

from scripts.corpus import PublicScript


def local_script(name: str, command: str, ranks: int = 1) -> PublicScript:
    """Return the script NAME.py of a test's folder, started by ``command`` on ``ranks`` processes."""
    return PublicScript(
        name=name,
        kind="",
        use="development",
        repository="",
        commit="",
        path=f"{name}.py",
        sha256="",
        packages=(),
        prepare="nothing",
        folder="{work}",
        command=command,
        ranks=ranks,
    )
