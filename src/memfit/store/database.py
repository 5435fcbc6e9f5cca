"""The store: one SQLite file to which rows are only ever added.

Each append is one transaction that is on disk when the call returns. A process that is killed at any moment
therefore leaves every finished append readable. The journal mode is the rollback journal, not WAL: WAL needs
memory shared by all processes that open the file, which network file systems do not provide. A connection
lives for one call.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from memfit.store.environment import digest, fingerprint
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.result import Record

APPLICATION_ID: Final = 0x6D666974  # "mfit", in the file's header: identifies a memfit store
SCHEMA_VERSION: Final = 1
TAKEN: Final = "taken"  # kind of a row that holds another group's record and the name of its source
_WAIT_S: Final = 30.0  # maximum time to wait for another process's append

_TABLES: Final = (
    """CREATE TABLE record (
        record_id INTEGER PRIMARY KEY AUTOINCREMENT,
        poc_id TEXT NOT NULL, kind TEXT NOT NULL, created TEXT NOT NULL,
        environment TEXT NOT NULL REFERENCES environment (digest), body TEXT NOT NULL)""",
    "CREATE TABLE environment (digest TEXT PRIMARY KEY, body TEXT NOT NULL)",
    "CREATE INDEX record_by_poc ON record (poc_id, kind)",
)
_GUARD: Final = """CREATE TRIGGER {table}_keeps_on_{event} BEFORE {event} ON {table} {condition}
    BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END"""
_KEYS: Final = {"record": "record_id", "environment": "digest"}


def default_path() -> Path:
    """Return ``memfit/memfit.sqlite3`` in the user's data folder: ``XDG_DATA_HOME``, or if that is not set
    the system's default, such as ~/.local/share on Linux."""
    import platformdirs

    return platformdirs.user_data_path("memfit", appauthor=False) / "memfit.sqlite3"


class Store:
    """Rows (`Record`) in an SQLite file; rows can be added, but never changed or deleted. ``path``: the file,
    by default `default_path`; it and its folder are created if they do not exist.

    Creating a Store and each method raise UserError if the file cannot be created, opened, read or written,
    and creating one also if it is not a memfit store of this version."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the folder of the store {self.path}: {error}",
                hint="choose another file with --store",
            ) from error
        with self._connection() as connection:
            with _snapshot(connection):
                is_new = self._is_new(connection)
            if is_new:
                self._create_tables(connection)

    def append(self, poc_id: str, kind: str, body: Any) -> Record:
        """Add one row with `body` as JSON (``serialization.dumps``), the current time and the environment of
        this process. Return it once it is on disk. ``poc_id``: the PoC to which the row belongs, or the label
        of a single run. ``kind``: what the body is, for example "run" or "poc"."""
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        name, environment = self._environment
        text = serialization.dumps(body)
        with self._connection() as connection, _transaction(connection):
            record_id = _insert(connection, (poc_id, kind, created, name, text), environment)
        return Record(
            record_id=record_id, poc_id=poc_id, kind=kind, created=created, environment=name, body=text
        )

    def add(self, poc_id: str, kind: str, body: Any, *, created: str, environment: Mapping[str, str]) -> bool:
        """Add one row that was made elsewhere: at the time ``created`` (ISO, UTC), in ``environment`` (a
        mapping as `fingerprint` returns it). Return whether it was added: an equal row is not added again,
        also if another process adds it at the same time."""
        row = (poc_id, kind, created, digest(environment), serialization.dumps(body))
        with self._connection() as connection, _transaction(connection):
            known = connection.execute(
                "SELECT 1 FROM record WHERE poc_id = ? AND kind = ? AND created = ? AND environment = ? "
                "AND body = ?",
                row,
            ).fetchone()
            if known is None:
                _insert(connection, row, environment)
        return known is None

    def records(self, poc_id: str | None = None, kind: str | None = None) -> tuple[Record, ...]:
        """Return rows in the order in which they were added: those of the PoC ``poc_id`` (None: of all PoCs
        and of single runs) that are of ``kind`` (None: of any kind)."""
        rows = self._rows(
            "SELECT record_id, poc_id, kind, created, environment, body FROM record "
            "WHERE (?1 IS NULL OR poc_id = ?1) AND (?2 IS NULL OR kind = ?2) ORDER BY record_id",
            poc_id,
            kind,
        )
        names = ("record_id", "poc_id", "kind", "created", "environment", "body")
        return tuple(Record(**dict(zip(names, row, strict=True))) for row in rows)

    def poc_ids(self) -> tuple[str, ...]:
        """Return the IDs of all PoCs that were begun with this store, also of unfinished ones, in the order
        in which they began. Single runs and records added from others are not included."""
        rows = self._rows(
            "SELECT poc_id FROM record WHERE kind IN ('begin', 'poc') GROUP BY poc_id ORDER BY min(record_id)"
        )
        return tuple(poc_id for (poc_id,) in rows)

    def latest_poc_id(self) -> str | None:
        """Return the ID of the PoC that was begun last, or None if there is none."""
        return next(reversed(self.poc_ids()), None)

    def environment(self, name: str) -> Mapping[str, str]:
        """Return the environment (a mapping as `fingerprint` returns it) whose digest is `name`. A Record's
        ``environment`` is such a digest. Raises UserError if the store has no environment with it."""
        rows = self._rows("SELECT body FROM environment WHERE digest = ?", name)
        if not rows:
            raise UserError(f"the store {self.path} has no recorded environment with the digest {name!r}")
        return dict(json.loads(rows[0][0]))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside this context, no other thread or process adds rows or is inside ``locked`` of the same file.
        Rows can be read, but not added, not even by this thread: an attempt, also to enter ``locked``, waits
        30 s and then raises UserError, unless the context is left before."""
        with self._connection() as connection, _transaction(connection):
            yield

    @functools.cached_property
    def _environment(self) -> tuple[str, Mapping[str, str]]:
        environment = fingerprint()
        return digest(environment), environment

    def _rows(self, query: str, *arguments: str | None) -> list[Any]:
        with self._connection() as connection:
            return connection.execute(query, arguments).fetchall()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
        except sqlite3.Error as error:
            raise UserError(
                f"the store {self.path} cannot be used: {error}", hint="choose another file with --store"
            ) from error

    def _is_new(self, connection: sqlite3.Connection) -> bool:
        """Return False if the file is a memfit store of this schema version, and True if it is empty. Raises
        UserError for any other database, including a memfit store of another schema version."""
        application, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
        if application == APPLICATION_ID and version == SCHEMA_VERSION:
            return False
        if application == APPLICATION_ID:
            raise UserError(
                f"the store {self.path} was written by another memfit: it has schema version {version}",
                allowed=f"version {SCHEMA_VERSION}, which this memfit reads",
                hint="update memfit, or choose another file with --store",
            )
        if application or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise UserError(
                f"{self.path} is an SQLite database, but not a memfit store",
                hint="choose another file with --store",
            )
        return True

    def _create_tables(self, connection: sqlite3.Connection) -> None:
        with _transaction(connection):
            if not self._is_new(connection):
                return  # another process has created the store first
            for statement in (*_TABLES, *_guards()):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def reporter_of(row: Record) -> str:
    """Return the name of the group that reports the record in ``row``, a row of the kind `TAKEN`; "others" if
    the row does not say."""
    return str(json.loads(row.body).get("from", "others"))


def _insert(
    connection: sqlite3.Connection, row: tuple[str, str, str, str, str], environment: Mapping[str, str]
) -> int:
    """Add ``row`` (poc_id, kind, created, digest of the environment, body), and ``environment`` unless it is
    stored already. Return the record_id of the new row."""
    connection.execute(
        "INSERT INTO environment SELECT ?1, ?2 WHERE ?1 NOT IN (SELECT digest FROM environment)",
        (row[3], json.dumps(dict(environment))),
    )
    cursor = connection.execute(
        "INSERT INTO record (poc_id, kind, created, environment, body) VALUES (?, ?, ?, ?, ?)", row
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


@contextlib.contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Inside this context, all reads see one state of the file, whatever other processes write."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _guards() -> Iterator[str]:
    """Yield the SQL of triggers for the tables record and environment, which abort an UPDATE, a DELETE, and
    an INSERT with an existing key: written as INSERT OR REPLACE, such an INSERT would silently delete the old
    row."""
    for table, key in _KEYS.items():
        exists_clause = f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key})"
        for event, condition in (("UPDATE", ""), ("DELETE", ""), ("INSERT", exists_clause)):
            yield _GUARD.format(table=table, event=event, condition=condition)
