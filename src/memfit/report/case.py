"""A job's memory at published sizes by tensor class, plan by plan: predicted beforehand and kept as data.

``cases/JOB.json`` is written by a benchmark from its own records; a proof of concept of that job shows it.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import Final

from memfit.report.figures import Figure, assumed, predicted

CLASSES: Final = (
    "pair", "msa", "triangle_logits", "msa_logits", "extra", "template", "structure", "states", "other",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseRung:
    """``plan``: its key among the words. ``parts``: bytes at the peak by class, in the order of CLASSES."""

    plan: str
    peak: Figure
    share: Figure  # % of the first one
    step: Figure
    fits: bool
    parts: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseSize:
    """``name``: key among the words; ``residues`` and ``rows`` of the crop."""

    name: str
    residues: int
    rows: int
    rungs: tuple[CaseRung, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseView:
    created: str
    device: str
    memory: Figure
    sizes: tuple[CaseSize, ...]


def case_view(job: str) -> CaseView | None:
    """What was recorded of the job; None for a job without such a record."""
    kept = resources.files("memfit.report").joinpath("cases", f"{job}.json")
    if not job.isidentifier() or not kept.is_file():
        return None
    told = json.loads(kept.read_text(encoding="utf-8"))
    sizes = tuple(
        CaseSize(
            name=size["name"], residues=size["residues"], rows=size["rows"],
            rungs=tuple(_rung(rung, size["rungs"][0]["peak_bytes"]) for rung in size["rungs"]),
        )
        for size in told["sizes"]
    )  # fmt: skip
    return CaseView(
        created=told["created"], device=told["device"], memory=assumed(told["memory_bytes"], "bytes"),
        sizes=sizes,
    )  # fmt: skip


def _rung(told: dict[str, object], first_bytes: float) -> CaseRung:
    peak, step, parts = told["peak_bytes"], told["step_s"], told["parts"]
    assert isinstance(peak, int | float)
    assert isinstance(step, int | float)
    assert isinstance(parts, dict)
    return CaseRung(
        plan=str(told["plan"]),
        peak=predicted(peak, "bytes"),
        share=predicted(100 * peak / first_bytes, "percent"),
        step=predicted(step, "s"),
        fits=bool(told["fits"]),
        parts=tuple((name, parts[name]) for name in CLASSES if parts.get(name)),
    )
