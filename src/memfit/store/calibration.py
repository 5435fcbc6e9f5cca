"""Store the timings of this machine on disk, so that later requests use the same measurements.

The timings are in one SQLite file in the user's cache folder. A row is never overwritten: a timed operator
keeps its time, whatever else the machine does later, until `forget` (``--recalibrate``) removes the rows of
this machine, torch version and number of threads. If the file cannot be written, nothing is stored and every
request measures for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from memfit.store.environment import VARIABLES, digest, fingerprint
from memfit.types import serialization
from memfit.types.machine import Calibration

_METHOD: Final = 1  # increased when the timing method changes, so that older rows are not read
_WAIT_S: Final = 10.0
_MACHINE: Final = ("processor", "cores", "torch", "libc")
_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS machine (key TEXT PRIMARY KEY, body TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS operator (
        key TEXT, signature TEXT, body TEXT NOT NULL, PRIMARY KEY (key, signature)) WITHOUT ROWID""",
)


def default_path() -> Path:
    """Return ``memfit/calibration.sqlite3`` in the user's cache folder: ``XDG_CACHE_HOME``, or if that is not
    set the system's default, such as ~/.cache on Linux."""
    import platformdirs

    return platformdirs.user_cache_path("memfit", appauthor=False) / "calibration.sqlite3"


def machine_key(threads: int, device: str = "") -> str:
    """Return a digest of everything on which a timing depends: the accelerator ``device`` ("" for none), the
    processor, its cores, the versions of torch and libc, the number of threads, the version of the timing
    method, and the environment `VARIABLES` except those with "CUDA" in their names."""
    environment = fingerprint()
    names = [*_MACHINE, *(f"env {name}" for name in VARIABLES if "CUDA" not in name)]
    facts = {**{n: environment[n] for n in names}, "threads": str(threads), "method": str(_METHOD)}
    return digest(facts | ({"device": device} if device else {}))


class CalibrationCache:
    """The calibration of this machine in a file: what was measured for the installed torch and ``threads``
    threads. It consists of rates, such as the speed of matrix products and of copies, and of the timings of
    single operators.

    ``path``: the file; None: `default_path`. ``device``: product name of the accelerator; "": the
    processor."""

    def __init__(self, threads: int, path: Path | None = None, *, device: str = "") -> None:
        self.path, self.key = path or default_path(), machine_key(threads, device)

    def read(self) -> Calibration:
        """Return the stored rates with the timings of all stored operators. Return an empty Calibration if no
        rates are stored, even if timings are, or if the file or a stored timing cannot be read. Raises
        UserError if the stored rates are not a valid calibration."""
        with contextlib.suppress(OSError, sqlite3.Error, ValueError), self._connection() as connection:
            rates = connection.execute("SELECT body FROM machine WHERE key = ?", (self.key,)).fetchone()
            rows = connection.execute("SELECT signature, body FROM operator WHERE key = ?", (self.key,))
            if rates is not None:
                calibration = serialization.loads(Calibration, rates[0], what="the stored calibration")
                return _with_operators(calibration, {signature: json.loads(body) for signature, body in rows})
        return Calibration()

    def add(self, fresh: Calibration) -> Calibration:
        """Store the rates of `fresh`, unless rates are stored already, and its timings of those operators
        that are not stored already. Return everything that is stored then. Return `fresh` itself if no rates
        are stored then, for example because the file cannot be written. Raises UserError as `read` does."""
        rates = dataclasses.replace(
            fresh, op_s={}, op_peak_bytes={}, op_kept_bytes={}, op_spread_ratio={}, not_timed=()
        )
        with contextlib.suppress(OSError, sqlite3.Error), self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                if fresh.flops_s:
                    insert = "INSERT OR IGNORE INTO machine VALUES (?, ?)"
                    connection.execute(insert, (self.key, serialization.dumps(rates)))
                connection.executemany(
                    "INSERT OR IGNORE INTO operator VALUES (?, ?, ?)",
                    [(self.key, signature, json.dumps(row)) for signature, row in _rows(fresh)],
                )
        stored = self.read()
        return stored if stored.flops_s else fresh

    def forget(self) -> None:
        """Delete the rates and timings that are stored for this machine, device, torch version and number of
        threads, so that all is measured again. Do nothing if the file cannot be written."""
        with contextlib.suppress(OSError, sqlite3.Error), self._connection() as connection:
            for table in ("machine", "operator"):
                connection.execute(f"DELETE FROM {table} WHERE key = ?", (self.key,))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        with contextlib.closing(database) as connection:
            for statement in _TABLES:
                connection.execute(statement)
            yield connection


def select_operators(calibration: Calibration, signatures: set[str]) -> Calibration:
    """Return `calibration` with all its rates, but only with the timings of the operators in ``signatures``,
    so that a result does not depend on operators that earlier requests have timed."""
    return dataclasses.replace(
        calibration,
        op_s={s: v for s, v in calibration.op_s.items() if s in signatures},
        op_peak_bytes={s: v for s, v in calibration.op_peak_bytes.items() if s in signatures},
        op_kept_bytes={s: v for s, v in calibration.op_kept_bytes.items() if s in signatures},
        op_spread_ratio={s: v for s, v in calibration.op_spread_ratio.items() if s in signatures},
        not_timed=tuple(s for s in calibration.not_timed if s in signatures),
    )


def _rows(calibration: Calibration) -> Iterator[tuple[str, dict[str, Any]]]:
    for signature, seconds in calibration.op_s.items():
        yield (
            signature,
            {
                "seconds": seconds,
                "peak_bytes": calibration.op_peak_bytes.get(signature, 0),
                "kept_bytes": calibration.op_kept_bytes.get(signature, 0),
                "spread_ratio": calibration.op_spread_ratio.get(signature, 0.0),
            },
        )
    for signature in calibration.not_timed:
        yield signature, {"seconds": None}


def _with_operators(calibration: Calibration, rows: dict[str, dict[str, Any]]) -> Calibration:
    timed = {s: row for s, row in rows.items() if row["seconds"] is not None}
    return dataclasses.replace(
        calibration,
        op_s={s: float(row["seconds"]) for s, row in timed.items()},
        op_peak_bytes={s: int(row["peak_bytes"]) for s, row in timed.items()},
        op_kept_bytes={s: int(row["kept_bytes"]) for s, row in timed.items() if row["kept_bytes"]},
        op_spread_ratio={s: float(row["spread_ratio"]) for s, row in timed.items()},
        not_timed=tuple(s for s, row in rows.items() if row["seconds"] is None),
    )
