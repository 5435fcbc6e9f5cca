"""``memfit record``: write a proof of concept as a record, which others can read, add the record of a proof
of concept or of a run to the store, or compare two records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions, StoreOptions
from memfit.cli.output import console, emit, emit_text, print_table, refuse_options
from memfit.cli.request import writable
from memfit.files.read import read_text
from memfit.files.replace import write_whole
from memfit.types.errors import UserError
from memfit.types.sanitize import one_line, replace_controls

if TYPE_CHECKING:
    import memfit.store
    import memfit.store.exchange


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """The ID of the record to write and the file for it; the record to add to the store and who reports it;
    two records to compare; or whether to print the format of records."""

    poc: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="ID of the proof of concept in the store whose record is written, or ID of a record from "
            "others that was added to the store. Refused for a proof of concept that is unfinished or "
            "recommends no plan. Default: the proof of concept begun last with this store, never a record "
            "from others. Not with --add, --compare or --schema.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="File to write the record to; overwritten if it exists. Default: standard output. Not with "
            "--add, --compare or --schema.",
        ),
    ] = None
    add: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json|DIR",
            help="Instead of writing a record, add one to the store. FILE.json: the record of a proof of "
            "concept from another group, refused if the store has a different one with this ID; or the run "
            "that `memfit run --record` wrote, for example on a machine of a cluster. DIR: a folder that "
            "`memfit export` wrote without --script for torchrun, slurm or skypilot, after its training was "
            "started: the run that its ranks have recorded there is merged, added, and printed as by "
            "`memfit run`. Not with --poc, --out, --compare or --schema.",
        ),
    ] = None
    reporter: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="With --add: name of the group that reports the record. Default: the name of the file. "
            "Without effect if the store already has the record. Refused without --add, and for the record "
            "of a run or a folder.",
        ),
    ] = None
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Only print the format of records, as a JSON Schema. Not with --poc, --out, --add or "
            "--compare.",
        ),
    ] = False
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Instead of writing a record, compare two, and say which quantities are not comparable and "
            "why. A and B: a file with the record of a proof of concept, or the ID of a proof of concept in "
            "the store, refused if it is unfinished or recommends no plan, or of a record that was added to "
            "the store from others. Not with --poc, --out, --add or --schema.",
        ),
    ] = None


def record(options: RecordOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Write the record of a proof of concept, one JSON file that others can read; add a record, or the run of
    an exported folder, to the store; or compare two records.

    With a folder, the exit code is that of `memfit run`."""
    writes = options.poc is not None or options.out is not None
    if sum((options.schema, options.add is not None, options.compare is not None, writes)) > 1:
        raise UserError(
            "--schema, --add, --compare, and writing a record (--poc, --out) exclude each other",
            allowed="one of --schema, --add and --compare alone; or --poc, --out, both or neither of them",
        )
    if options.reporter is not None and options.add is None:
        raise UserError(
            "--from names the group that reports the record of --add, so it needs --add",
            allowed="--add FILE.json --from NAME",
        )
    quiet_libraries()
    from memfit.store import Store, exchange
    from memfit.store.database import TAKEN
    from memfit.store.exchange.run_record import add_run, is_run_record, parse_run_record

    if options.schema:
        emit(exchange.schema())
        return
    if options.compare is not None:
        _compare(options.compare, store.store, as_json=output.json)
        return
    records = Store(store.store)
    if options.add is not None and options.add.is_dir():
        refuse_options({"--from": options.reporter}, "is for the record of a proof of concept, not for a run")
        _add_exported(options.add, records, as_json=output.json)
        return
    if options.add is not None and is_run_record(options.add):
        refuse_options({"--from": options.reporter}, "is for the record of a proof of concept, not for a run")
        run_record = parse_run_record(read_text(options.add), what=str(options.add))
        _print_added(run_record.label, added=add_run(records, run_record), as_json=output.json)
        return
    if options.add is not None:
        received = exchange.read(options.add)
        stored = _find_same(records, received, str(options.add))
        if stored is None:
            body = {"from": options.reporter or options.add.name, "record": received.model_dump(mode="json")}
            records.append(received.poc_id, TAKEN, body)
        _print_added(received.poc_id, added=stored is None, as_json=output.json)
        return
    text = exchange.text(find_record(options.poc, store.store).record)
    if options.out is None:
        emit_text(text)
    else:
        write_whole(writable(options.out), text.encode())
        emit({"record": str(options.out)}) if output.json else print(options.out)


def _print_added(name: str, *, added: bool, as_json: bool) -> None:
    if as_json:
        emit({"added" if added else "already_stored": name})
    else:
        print(f"{'added' if added else 'already in the store:'} {name}")


def _add_exported(folder: Path, store: memfit.store.Store, *, as_json: bool) -> None:
    """Add to the store the run that an exported folder has trained, and print it. The exit code is that of
    `memfit run`. Raises UserError as `read_exported_run` does."""
    from memfit.cli.run import exit_code, lines
    from memfit.cli.views import run_view
    from memfit.store.exchange.run_record import add_run
    from memfit.workflows.exported_run import read_exported_run

    run_record = read_exported_run(folder)
    add_run(store, run_record)
    run = run_record.run
    emit(run_view(run)) if as_json else print(replace_controls("\n".join(lines(run))))
    if (code := exit_code(run)) != 0:
        raise typer.Exit(code)


def _compare(names: tuple[str, str], store: Path | None, *, as_json: bool) -> None:
    """Print the quantities of the two records ``names``, and which are not comparable and why. Raises
    UserError as `find_record` does."""
    from memfit.store import exchange

    records = [find_record(name, store) for name in names]
    rows = exchange.compare(*(sourced.record for sourced in records))
    sources = {side: sourced.taken_from for side, sourced in zip("AB", records, strict=True)}
    if as_json:
        header = {"a": names[0], "b": names[1], "taken_from": sources}
        emit(header | {"compared": [r.model_dump() for r in rows]})
        return
    print_table(
        ("Quantity", "A", "B", "B / A"),
        [
            (r.quantity, _value_text(r.a), _value_text(r.b), "" if r.ratio is None else f"{r.ratio:.3f}")
            for r in rows
        ],
    )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.against:
            reasons.setdefault(reason, []).append(row.quantity)
    for reason, quantities in reasons.items():
        quantity_names = "all quantities" if len(quantities) == len(rows) else ", ".join(quantities)
        console().print(one_line(f"not comparable, because {reason}: {quantity_names}"), markup=False)
    for side, source in sources.items():
        if source:
            console().print(one_line(f"{side} was not measured here: {source} reports it"), markup=False)


def _value_text(value: float | str | None) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else value or "none"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourcedRecord:
    """A record and its origin. ``taken_from``: "" if it was measured here; else the group that reports it, or
    the name of the file that it was read from."""

    record: memfit.store.exchange.Shared
    taken_from: str


def find_record(name: str | None, path: Path | None) -> SourcedRecord:
    """Return the record in the file ``name`` if there is such a file, otherwise the one with the ID ``name``
    in the store. None: the record of the proof of concept begun last. ``path``: the store; None: the user's.
    If the store also has the record of the file, the origin is the one in the store, otherwise the file.
    Raises UserError if there is no such record, if the file is no valid record, if the proof of concept in
    the store is unfinished or recommends no plan, or if the store has a different record with the ID of the
    file's."""
    from memfit.store import Store, exchange
    from memfit.store.pocs import resolve_poc_id

    records = Store(path)
    if name is not None and Path(name).is_file():
        file_record = exchange.read(Path(name))
        stored = _find_same(records, file_record, name)
        return stored or SourcedRecord(record=file_record, taken_from=name)
    if name is not None and ("/" in name or name.endswith(".json")):
        raise UserError(
            f"there is no file {name}, which cannot be an ID, as it contains a / or ends in .json",
            allowed="a file with a record, or the ID of a record in the store",
        )
    return _find_stored(records, resolve_poc_id(records, name))


def _find_stored(store: memfit.store.Store, poc_id: str) -> SourcedRecord:
    """Return the record of the proof of concept with the ID ``poc_id`` that was measured with ``store``. If
    there is none, return the record with this ID that was added last from others. Raises UserError if there
    is neither, or if the proof of concept is unfinished or recommends no plan."""
    from memfit.store import exchange
    from memfit.store.database import TAKEN, reporter_of
    from memfit.workflows import proof_of_concept

    received = store.records(poc_id, TAKEN)
    if not received or poc_id in store.poc_ids():
        return SourcedRecord(
            record=exchange.of_poc(proof_of_concept.stored_poc(store, poc_id)), taken_from=""
        )
    body = json.loads(received[-1].body)
    record = exchange.parse_record(json.dumps(body.get("record", body)), what=f"record {poc_id}")
    return SourcedRecord(record=record, taken_from=reporter_of(received[-1]))


def _find_same(
    store: memfit.store.Store, file_record: memfit.store.exchange.Shared, source: str
) -> SourcedRecord | None:
    """Return the record in the store with the ID of ``file_record``, or None if there is none. Raises
    UserError if the JSON texts of the two differ, and if this ID in the store is that of a proof of concept
    that is unfinished or recommends no plan. ``source``: what the error calls ``file_record``."""
    from memfit.store import exchange
    from memfit.store.database import TAKEN

    if file_record.poc_id not in store.poc_ids() and not store.records(file_record.poc_id, TAKEN):
        return None
    stored = _find_stored(store, file_record.poc_id)
    if exchange.text(stored.record) != exchange.text(file_record):
        raise UserError(
            f"the record in the file {source} has the ID {file_record.poc_id}, but the store has a different "
            "record with this ID",
            hint=f"`memfit record --poc {file_record.poc_id}` prints the store's record; --store "
            "chooses another store",
        )
    return stored
