"""Write an export's files into a folder: completely or not at all if it is new or empty, otherwise only if
forced, file by file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from memfit.export.base import Files
from memfit.files.read import read_json
from memfit.files.temporary import temporary_folder
from memfit.types.errors import UserError

MANIFEST: Final = "export.json"  # what was written, with digests; written last


def check_folder(folder: Path, *, force: bool = False) -> None:
    """Raise UserError if `write` would refuse the folder: it is a file, it contains anything and ``force`` is
    not set, or its parent folder does not exist. To be called before any long work begins."""
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and (not force or not folder.is_dir()):
        raise UserError(
            f"{folder} already exists and is not an empty folder",
            allowed="a folder that is new or empty",
            hint="--force writes into it nevertheless" if folder.is_dir() else "it is a file, not a folder",
        )
    if not folder.absolute().parent.is_dir():
        raise UserError(
            f"{folder} cannot be written: there is no folder {folder.parent}", hint="create that folder first"
        )


def write(folder: Path, files: Files, *, force: bool = False) -> None:
    """Write ``files`` (name -> text) into ``folder``, which is created if it does not exist, with a manifest
    export.json that lists the SHA-256 of each. Files named *.sh become executable. If the folder is new or
    empty, either all files appear or none.

    Raises UserError if the folder is a file, if it contains anything and ``force`` is not set, if its parent
    folder does not exist, or if writing fails. With ``force``, files of the same names are replaced, and
    files that an earlier export wrote and that are not in ``files`` are removed; everything else stays.
    """
    check_folder(folder, force=force)
    occupied = folder.is_dir() and any(folder.iterdir())
    try:
        _write(folder, files, replacing=occupied)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from error


def _write(folder: Path, files: Files, *, replacing: bool) -> None:
    manifest = json.dumps({"files": {n: digest(t) for n, t in sorted(files.items())}}, indent=2) + "\n"
    with temporary_folder(f".{folder.name}-", folder.absolute().parent) as staging:
        new = staging / "new"
        new.mkdir()
        for name, text in {**files, MANIFEST: manifest}.items():
            (new / name).write_bytes(text.encode())
            if name.endswith(".sh"):
                (new / name).chmod(0o755)
        if not replacing:
            new.replace(folder)  # this also replaces an empty folder
            return
        stale = _written_before(folder) - files.keys()
        for name in files:
            (new / name).replace(folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        (new / MANIFEST).replace(folder / MANIFEST)


def digest(text: str) -> str:
    """Return the SHA-256 of ``text`` in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _written_before(folder: Path) -> set[str]:
    try:
        names = read_json(folder / MANIFEST)["files"]
    except (UserError, KeyError, TypeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}
