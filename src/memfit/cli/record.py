"""``memfit record``: a proof of concept in the format that is shared; ``memfit compare``: two of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.options import JsonOptions, StoreOptions
from memfit.cli.output import console, emit, print_table
from memfit.cli.quiet import quiet_libraries
from memfit.cli.request import writable
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import memfit.shared
    import memfit.store


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    poc: Annotated[
        str | None, typer.Option(metavar="ID", help="Which proof of concept. Default: the last.")
    ] = None
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Default: standard output.")] = None
    add: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Take another group's record into the store.")
    ] = None
    schema: Annotated[bool, typer.Option("--schema", help="Print the format's JSON Schema.")] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    a: Annotated[str, typer.Argument(metavar="A", help="A record's file, or the ID of one in the store.")]
    b: Annotated[str, typer.Argument(metavar="B", help="The other.")]


def record(own: RecordOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Write a proof of concept as one JSON file that others can read, or take theirs in."""
    if sum((own.schema, own.add is not None, own.poc is not None or own.out is not None)) > 1:
        raise UserError("--schema, --add and --poc or --out together", allowed="one of them")
    quiet_libraries()
    from memfit import shared
    from memfit.store import Store
    from memfit.store.database import TAKEN

    if own.schema:
        emit(shared.schema())
        return
    kept = Store(store.store)
    if own.add is not None:
        taken = shared.read(own.add)
        kept.append(taken.poc_id, TAKEN, taken.model_dump(mode="json"))
        emit({"added": taken.poc_id}) if output.json else print(f"added {taken.poc_id}")
        return
    text = shared.text(found_record(own.poc, store.store))
    if own.out is None:
        print(text, end="")
    else:
        writable(own.out).write_text(text, encoding="utf-8")
        emit({"record": str(own.out)}) if output.json else print(own.out)


def compare(own: CompareOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Say in what two records may be compared, and in what not and why."""
    quiet_libraries()
    from memfit import shared

    rows = shared.compare(*(found_record(name, store.store) for name in (own.a, own.b)))
    if output.json:
        emit({"a": own.a, "b": own.b, "compared": [r.model_dump() for r in rows]})
        return
    print_table(
        ("Quantity", "A", "B", "B / A"),
        [(r.quantity, _told(r.a), _told(r.b), f"{r.ratio:.3f}" if r.ratio else "") for r in rows],
    )
    for row in rows:
        if row.against:
            console().print(f"{row.quantity}: not comparable: {'; '.join(row.against)}", markup=False)


def _told(value: float | str | None) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else value or "none"


def found_record(name: str | None, path: Path | None) -> memfit.shared.Shared:
    """A file, or an ID in the store, the last PoC's by default. Raises UserError."""
    from memfit import shared
    from memfit.store import Store

    if name is not None and Path(name).is_file():
        return shared.read(Path(name))
    if name is not None and ("/" in name or name.endswith(".json")):
        raise UserError(f"there is no file {name}")
    kept = Store(path)
    wanted = name or kept.latest_poc_id()
    if wanted is None:
        raise UserError(f"there is no proof of concept in {kept.path}", hint="run `memfit poc` first")
    return _stored(kept, wanted)


def _stored(kept: memfit.store.Store, wanted: str) -> memfit.shared.Shared:
    """Our own PoC, or a record that was taken in."""
    from memfit import pipeline, shared
    from memfit.store.database import TAKEN

    if taken := kept.records(wanted, TAKEN):
        return shared.parsed(taken[-1].body, what=f"record {wanted}")
    return shared.of_poc(pipeline.stored_poc(kept, wanted))
