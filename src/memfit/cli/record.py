"""``memfit record``: write a proof of concept in the format for sharing. ``memfit compare``: compare two of
them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions, StoreOptions
from memfit.cli.output import console, emit, print_table
from memfit.cli.request import writable
from memfit.types.errors import UserError
from memfit.types.sanitize import one_line

if TYPE_CHECKING:
    import memfit.store
    import memfit.store.exchange


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """The record to write or to add."""

    poc: Annotated[
        str | None, typer.Option(metavar="ID", help="Which proof of concept. Default: the last.")
    ] = None
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Default: standard output.")] = None
    add: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Take another group's record into the store.")
    ] = None
    said_by: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="With --add: whose it is. Default: the file's name."),
    ] = None
    schema: Annotated[bool, typer.Option("--schema", help="Print the format's JSON Schema.")] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """The two records to compare."""

    a: Annotated[str, typer.Argument(metavar="A", help="A record's file, or the ID of one in the store.")]
    b: Annotated[str, typer.Argument(metavar="B", help="The other.")]


def record(own: RecordOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Write a proof of concept as one JSON file that others can read, or add one from others to the store."""
    if sum((own.schema, own.add is not None, own.poc is not None or own.out is not None)) > 1:
        raise UserError("--schema, --add and --poc or --out together", allowed="one of them")
    if own.said_by is not None and own.add is None:
        raise UserError("--from without --add", allowed="both, or neither")
    quiet_libraries()
    from memfit.store import Store, exchange
    from memfit.store.database import TAKEN

    if own.schema:
        emit(exchange.schema())
        return
    kept = Store(store.store)
    if own.add is not None:
        taken = exchange.read(own.add)
        known = _known(kept, taken, str(own.add))
        if known is None:
            body = {"from": own.said_by or own.add.name, "record": taken.model_dump(mode="json")}
            kept.append(taken.poc_id, TAKEN, body)
        done = "added" if known is None else "already there:"
        emit({"added": taken.poc_id}) if output.json else print(f"{done} {taken.poc_id}")
        return
    text = exchange.text(found_record(own.poc, store.store).record)
    if own.out is None:
        print(text, end="")
    else:
        writable(own.out).write_text(text, encoding="utf-8")
        emit({"record": str(own.out)}) if output.json else print(own.out)


def compare(own: CompareOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Compare two records, and say which quantities are not comparable and why."""
    quiet_libraries()
    from memfit.store import exchange

    both = [found_record(name, store.store) for name in (own.a, own.b)]
    rows = exchange.compare(*(found.record for found in both))
    sources = {side: found.taken_from for side, found in zip("AB", both, strict=True)}
    if output.json:
        told = {"a": own.a, "b": own.b, "taken_from": sources}
        emit(told | {"compared": [r.model_dump() for r in rows]})
        return
    print_table(
        ("Quantity", "A", "B", "B / A"),
        [(r.quantity, _told(r.a), _told(r.b), f"{r.ratio:.3f}" if r.ratio else "") for r in rows],
    )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.against:
            reasons.setdefault(reason, []).append(row.quantity)
    for reason, quantities in reasons.items():
        named = "all of it" if len(quantities) == len(rows) else ", ".join(quantities)
        console().print(one_line(f"not comparable, as {reason}: {named}"), markup=False)
    for side, source in sources.items():
        if source:
            console().print(one_line(f"{side} was not measured here: {source} says so"), markup=False)


def _told(value: float | str | None) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else value or "none"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordFound:
    """A record and its origin. ``taken_from``: who reports it; "" if it was measured here."""

    record: memfit.store.exchange.Shared
    taken_from: str


def found_record(name: str | None, path: Path | None) -> RecordFound:
    """Return the record in the file ``name``, or the one in the store at ``path`` with the ID ``name``, by
    default the last proof of concept. Raises UserError if there is none."""
    from memfit.store import Store, exchange
    from memfit.store.pocs import wanted_poc

    kept = Store(path)
    if name is not None and Path(name).is_file():
        given = exchange.read(Path(name))
        known = _known(kept, given, name)
        return known or RecordFound(record=given, taken_from=name)
    if name is not None and ("/" in name or name.endswith(".json")):
        raise UserError(f"there is no file {name}")
    return _stored(kept, wanted_poc(kept, name))


def _stored(kept: memfit.store.Store, wanted: str) -> RecordFound:
    """Return our own proof of concept with the ID ``wanted``, or a record from others."""
    from memfit.store import exchange
    from memfit.store.database import TAKEN, taken_from
    from memfit.workflows import proof_of_concept

    taken = kept.records(wanted, TAKEN)
    if not taken or wanted in kept.poc_ids():
        return RecordFound(record=exchange.of_poc(proof_of_concept.stored_poc(kept, wanted)), taken_from="")
    body = json.loads(taken[-1].body)
    record = exchange.parsed(json.dumps(body.get("record", body)), what=f"record {wanted}")
    return RecordFound(record=record, taken_from=taken_from(taken[-1]))


def _known(kept: memfit.store.Store, given: memfit.store.exchange.Shared, what: str) -> RecordFound | None:
    """Return what the store has under the ID of `given`, or None if it has nothing. Raises UserError if it
    has anything but the same record, byte for byte."""
    from memfit.store import exchange
    from memfit.store.database import TAKEN

    if given.poc_id not in kept.poc_ids() and not kept.records(given.poc_id, TAKEN):
        return None
    found = _stored(kept, given.poc_id)
    if exchange.text(found.record) != exchange.text(given):
        raise UserError(
            f"{what} has the ID {given.poc_id}, and is not the record that the store has under it",
            hint=f"`memfit record --poc {given.poc_id}` writes that one; --store names another store",
        )
    return found
