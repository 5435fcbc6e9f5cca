"""Read proofs of concept (PoCs) from the store, and store the minutes that people attended to them."""

from __future__ import annotations

import dataclasses
import math
import re

from memfit.store.database import TAKEN, Store, reporter_of
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.result import Poc, Run

_POC_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
ATTENDED = "attended"  # kind of a row with the minutes for which people attended to a PoC


def resolve_poc_id(store: Store, poc_id: str | None) -> str:
    """Return ``poc_id``, which need not exist, or, if it is None or "", the ID of the PoC in the store that
    was begun last. Raises UserError if it is None or "" and the store has no PoC."""
    resolved_id = poc_id or store.latest_poc_id()
    if resolved_id is None:
        raise UserError(
            f"there is no proof of concept in the store {store.path}",
            hint="run `memfit poc` first, or name another store with --store",
        )
    return resolved_id


def store_attended_minutes(store: Store, poc_id: str | None, minutes: float) -> None:
    """Store for how many minutes people attended to the PoC ``poc_id``; None: the one begun last. Minutes
    stored before no longer count. Raises UserError if ``minutes`` is negative or not finite, and as
    `stored_poc` does."""
    resolved_id = resolve_poc_id(store, poc_id)
    if not 0 <= minutes < math.inf:
        raise UserError(f"--attended-minutes is {minutes:g}", allowed="a finite number of at least 0")
    stored_poc(store, resolved_id)
    store.append(resolved_id, ATTENDED, minutes)


def stored_poc(store: Store, poc_id: str) -> Poc:
    """Return the PoC as it was stored when it finished; or an unfinished one as it was stored when it began,
    with the runs that have ended since. The attended minutes that were stored last are included. Raises
    UserError if the store does not have the PoC, or only a record of it from others, if the PoC's ID could
    not be part of a file name, and if what is stored cannot be read."""
    poc, minutes = _stored_poc(store, poc_id), store.records(poc_id, ATTENDED)
    if not _POC_ID.fullmatch(poc.poc_id):  # it becomes a part of file names
        raise UserError(
            f"the PoC {poc.poc_id[:80]!r} in the store {store.path} has an invalid ID",
            allowed="1 to 80 letters, digits, dots, hyphens and underscores, with no dot at the beginning",
        )
    if not minutes:
        return poc
    effort = dataclasses.replace(poc.effort, attended_minutes=float(minutes[-1].body))
    return dataclasses.replace(poc, effort=effort)


def _stored_poc(store: Store, poc_id: str) -> Poc:
    if finished_rows := store.records(poc_id, "poc"):
        return serialization.loads(Poc, finished_rows[-1].body, what=f"record {finished_rows[-1].record_id}")
    begin_rows = store.records(poc_id, "begin")
    if not begin_rows and (taken_rows := store.records(poc_id, TAKEN)):
        reporter = reporter_of(taken_rows[-1])
        raise UserError(
            f"{poc_id} is a record from {reporter}, not measured here, so the store has no PoC with its runs",
            hint="`memfit decide ID --gates default` and `memfit record --compare` can read it",
        )
    if not begin_rows:
        raise UserError(f"no PoC {poc_id!r} in {store.path}", allowed=", ".join(store.poc_ids()) or "none")
    runs = tuple(
        serialization.loads(Run, r.body, what=f"record {r.record_id}") for r in store.records(poc_id, "run")
    )
    return dataclasses.replace(
        serialization.loads(Poc, begin_rows[0].body, what="record"), runs=runs, finished=False
    )
