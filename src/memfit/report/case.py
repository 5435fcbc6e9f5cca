"""A job's memory at published sizes by tensor class, for several plans: predicted in advance and stored as
data.

``cases/JOB.json`` is written by a benchmark from its own records. The report of a proof of concept of that
job shows it.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import Any, Final

from memfit.report.quantities import Figure, assumed, predicted
from memfit.types import serialization
from memfit.types.result import Offer

CLASSES: Final = (
    "pair",
    "msa",
    "triangle_logits",
    "msa_logits",
    "extra",
    "template",
    "structure",
    "states",
    "other",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CasePlan:
    """The stored prediction for one plan at one published size of a job.

    ``plan``: end of the key of its name in the word catalogs, which is ``case.plan.PLAN``. ``share``: its
    peak in % of that of the first plan at this size; ``step``: predicted time of one step; ``fits``: whether
    the plan fits the device. ``parts``: (kind of tensors, such as "msa"; bytes at the peak) in the order of
    CLASSES; kinds with 0 bytes are left out.
    """

    plan: str
    peak: Figure
    share: Figure
    step: Figure
    fits: bool
    parts: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseSize:
    """One published size of the job. ``name``: end of the key of its name in the word catalogs, which is
    ``case.size.NAME``. A sample has ``residues`` positions and ``rows`` sequences. ``plans``: the plans
    predicted at this size, in the stored order."""

    name: str
    residues: int
    rows: int
    plans: tuple[CasePlan, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseView:
    """The stored predictions for one job on one device. ``created``: when they were made; ``memory``: that of
    the device."""

    created: str
    device: str
    memory: Figure
    sizes: tuple[CaseSize, ...]


def case_view(job: str) -> CaseView | None:
    """Return the predictions for the job named ``job`` that are stored in this package (``cases/JOB.json``),
    or None if there are none."""
    case = _stored_case(job)
    if case is None:
        return None
    sizes = tuple(
        CaseSize(
            name=size["name"],
            residues=size["residues"],
            rows=size["rows"],
            plans=tuple(_plan(record, size["rungs"][0]["peak_bytes"]) for record in size["rungs"]),
        )
        for size in case["sizes"]
    )
    return CaseView(
        created=case["created"],
        device=case["device"],
        memory=assumed(case["memory_bytes"], "bytes"),
        sizes=sizes,
    )


def case_offers(job: str) -> tuple[Offer, ...]:
    """Return the predictions for single devices with a price that are stored in this package
    (``cases/JOB.json``) for the job named ``job``: for each device, one of plain training and one of the
    recommended plan. Empty if none are stored."""
    case = _stored_case(job) or {}
    return tuple(
        serialization.loads(Offer, json.dumps(offer), what="a stored case")
        for offer in case.get("offers", ())
    )


def _stored_case(job: str) -> dict[str, Any] | None:
    path = resources.files("memfit.report").joinpath("cases", f"{job}.json")
    if not job.isidentifier() or not path.is_file():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _plan(record: dict[str, object], first_bytes: float) -> CasePlan:
    peak, step, parts = record["peak_bytes"], record["step_s"], record["parts"]
    assert isinstance(peak, int | float)
    assert isinstance(step, int | float)
    assert isinstance(parts, dict)
    return CasePlan(
        plan=str(record["plan"]),
        peak=predicted(peak, "bytes"),
        share=predicted(100 * peak / first_bytes, "percent"),
        step=predicted(step, "s"),
        fits=bool(record["fits"]),
        parts=tuple((name, parts[name]) for name in CLASSES if parts.get(name)),
    )
