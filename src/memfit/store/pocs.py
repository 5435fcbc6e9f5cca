"""Read proofs of concept from the store."""

from __future__ import annotations

import dataclasses
import math

from memfit.store.database import TAKEN, Store, taken_from
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.result import Poc, Run

ATTENDED = "attended"  # kind of a row with the minutes for which people attended to a PoC


def wanted_poc(store: Store, poc_id: str | None) -> str:
    """Return ``poc_id``, or the ID of the latest PoC if it is None. Raises UserError if there is none."""
    wanted = poc_id or store.latest_poc_id()
    if wanted is None:
        raise UserError(f"there is no proof of concept in {store.path}", hint="run `memfit poc` first")
    return wanted


def attended(store: Store, poc_id: str | None, minutes: float) -> None:
    """Store for how many minutes people attended to a PoC, the latest by default. The last value counts.
    Raises UserError."""
    wanted = wanted_poc(store, poc_id)
    if not 0 <= minutes < math.inf:
        raise UserError(f"--attended-minutes {minutes:g}", allowed="a number of at least 0")
    stored_poc(store, wanted)
    store.append(wanted, ATTENDED, minutes)


def stored_poc(store: Store, poc_id: str) -> Poc:
    """Return the finished PoC, or the beginning of an unfinished one with its runs so far. The minutes that
    people entered are included. Raises UserError if the PoC was not measured here."""
    found, minutes = _stored_poc(store, poc_id), store.records(poc_id, ATTENDED)
    if not minutes:
        return found
    counted = dataclasses.replace(found.effort, attended_minutes=float(minutes[-1].body))
    return dataclasses.replace(found, effort=counted)


def _stored_poc(store: Store, poc_id: str) -> Poc:
    if finished := store.records(poc_id, "poc"):
        return serialization.loads(Poc, finished[-1].body, what=f"record {finished[-1].record_id}")
    started = store.records(poc_id, "begin")
    if not started and (taken := store.records(poc_id, TAKEN)):
        raise UserError(
            f"{poc_id} was taken in from {taken_from(taken[-1])}, not measured here: it has no runs",
            hint="`memfit scale` and `memfit compare` read it",
        )
    if not started:
        raise UserError(f"no PoC {poc_id!r} in {store.path}", allowed=", ".join(store.poc_ids()) or "none")
    runs = tuple(
        serialization.loads(Run, r.body, what=f"record {r.record_id}") for r in store.records(poc_id, "run")
    )
    return dataclasses.replace(
        serialization.loads(Poc, started[0].body, what="record"), runs=runs, finished=False
    )
