"""Recommendations for reference machines, with jobs of known size in place of the published ones."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import attention_calls
import pytest
from tiny import regression, words
from torch import nn

from memfit import catalog
from memfit.planner.selection import Objective
from memfit.types.dependence import DependenceKind, SampleDependence
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Accuracy, Bounds, Plan
from memfit.types.result import LargestSize
from memfit.workflows import reference_machines

WIDTH, OUTPUTS = 1000, {"650M": 10**5, "3B": 2 * 10**6, "15B": 2 * 10**7}  # 0.1, 2 and 20 billion weights
LENGTH_OUTPUTS = {"paper@1024": 10**5, "paper@2048": 2 * 10**6}  # length fills memory as size does


def sized(ref: JobRef) -> Job:
    """Models wide enough to fill accelerators; on fake tensors they take no memory."""
    outputs = OUTPUTS.get(ref.size or "", LENGTH_OUTPUTS.get(ref.size or ""))
    if outputs is None:
        return words(2)
    return dataclasses.replace(
        regression(lambda: nn.Sequential(nn.Linear(8, WIDTH), nn.Linear(WIDTH, outputs, bias=False))),
        loss=lambda model, batch: model(batch[0][:1]).square().mean(),
        size=ref.size or "",
    )


def planning(accuracy: Accuracy = Accuracy.EXACT) -> Any:
    request = SimpleNamespace(
        job_ref=JobRef(spec="protein-ss", size="tiny", batch=2, steps=3),
        machine=SimpleNamespace(place=None),
        accuracy=accuracy,
        goal=Objective.FASTEST,
        bounds=Bounds(),
    )
    independent = SampleDependence(kind=DependenceKind.INDEPENDENT)
    predictor = SimpleNamespace(dependence=independent)
    return SimpleNamespace(request=request, result=SimpleNamespace(recommended=None), predictor=predictor)


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[JobRef]:
    asked: list[JobRef] = []

    def load(ref: JobRef) -> Job:
        asked.append(ref)
        return sized(ref)

    monkeypatch.setattr(reference_machines, "load", load)
    monkeypatch.setattr(reference_machines, "LENGTHS", (1024, 2048))
    monkeypatch.setattr(
        reference_machines, "sizes", lambda spec: ("tiny", "paper", *OUTPUTS) if spec == "protein-ss" else ()
    )
    return asked


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """Ignores the progress."""


def reached(quantity: str, accuracy: Accuracy = Accuracy.EXACT) -> dict[str, LargestSize]:
    return {
        r.machine: r for r in reference_machines.reach(planning(accuracy), quiet) if r.quantity == quantity
    }


def test_there_is_one_row_per_machine_at_the_papers_size(jobs: list[JobRef]) -> None:
    rows, offers = reference_machines.paper(planning(Accuracy.ROUNDING), quiet)
    assert {r.machine for r in rows} == set(reference_machines.MACHINES)
    assert {o.machine for o in offers} > set(reference_machines.MACHINES)
    for row in rows:
        (plain,) = (o for o in offers if o.machine == row.machine and o.plain)
        assert (plain.fits, plain.step_s) == (row.plain_fits, row.plain.step_s)
    assert jobs == [JobRef(spec="protein-ss", size="paper")]  # the tiny batch and steps are not the paper's
    for row in rows:
        assert row.device_memory_bytes == catalog.machine(row.machine, "world").device.memory_bytes.value
        assert row.plain_fits  # kilobytes
        assert row.plain.step_s is not None
        assert row.recommended is not None
        assert not row.recommended.traced


def test_a_job_that_fits_no_machine_has_no_recommendation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_machines, "MACHINES", ("RTX-4090",))
    monkeypatch.setattr(reference_machines, "priced_accelerators", lambda: ("RTX-4090",))
    monkeypatch.setattr(reference_machines, "load", lambda ref: sized(dataclasses.replace(ref, size="15B")))
    (row,), (offer,) = reference_machines.paper(planning(), quiet)
    assert (offer.plain, offer.fits) == (True, False)
    assert (row.plain_fits, row.recommended, row.size) == (False, None, "15B")


def test_a_job_without_published_sizes_is_offered_as_it_is(jobs: list[JobRef]) -> None:
    own = planning()
    own.request.job_ref = JobRef(spec="own.py:job", batch=2)
    rows, offers = reference_machines.paper(own, quiet)
    assert rows == ()
    assert jobs == [own.request.job_ref]
    assert (True, True) in [(o.plain, o.fits) for o in offers if o.machine == "RTX-4090"]
    assert reference_machines.reach(own, quiet) == ()


def test_cards_with_other_kernels_have_traces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    job = attention_calls.job_of("causal, bfloat16, 64")
    monkeypatch.setattr(reference_machines, "load", lambda ref: job)
    names = ("A100-80GB-SXM", "H100-SXM", "RTX-4090", "T4")
    made = reference_machines._predictors(planning(), JobRef(spec="own.py:job"), names)
    a100, h100, rtx, t4 = (predictor.sketch(Plan()).allocated_bytes.value for predictor in made)
    assert t4 > 2 * a100
    assert made[0].part_digests is made[1].part_digests is not made[2].part_digests
    assert a100 == pytest.approx(rtx, rel=0.01)
    assert h100 < t4


def test_reach_is_the_largest_size_that_fits() -> None:
    """AdamW in float32 takes at least 16 B a weight: 2 billion are 32 GB, 20 billion 320 GB."""
    rows = reached("parameters")
    card, server = rows["RTX-4090"], rows["A100-80GB-SXM"]
    assert (card.plain_label, server.plain_label) == ("650M", "3B")
    assert card.plain == 8 * WIDTH + WIDTH + WIDTH * 10**5
    assert server.plain == 8 * WIDTH + WIDTH + WIDTH * 2 * 10**6
    assert not any(r.at_limit for r in rows.values())
    assert all((r.recommended or 0) >= (r.plain or 0) for r in rows.values())


def test_reach_in_length_is_of_one_sample_at_the_papers_size(jobs: list[JobRef]) -> None:
    rows = reached("length")
    assert (rows["RTX-4090"].plain, rows["A100-80GB-SXM"].plain) == (1024, 2048)
    assert (rows["RTX-4090"].at_limit, rows["A100-80GB-SXM"].at_limit) == (False, True)
    lengths = [j for j in jobs if j.size in LENGTH_OUTPUTS]
    assert {j.batch for j in lengths} == {1}
    assert len(lengths) == 2  # loaded once, whatever the number of machines


def test_a_job_without_lengths_has_no_reach_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ref: JobRef) -> Job:
        raise UserError("potential at length 1024", allowed="no length")

    monkeypatch.setattr(reference_machines, "load", refuse)
    assert reached("length") == {}


def test_reach_is_unknown_where_not_even_the_smallest_size_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_machines, "MACHINES", ("RTX-4090",))
    monkeypatch.setattr(reference_machines, "priced_accelerators", lambda: ("RTX-4090",))
    monkeypatch.setattr(reference_machines, "load", lambda ref: sized(dataclasses.replace(ref, size="15B")))
    (row,) = reached("parameters").values()
    assert (row.plain, row.recommended, row.plain_label, row.at_limit) == (None, None, "", False)


def test_reach_is_marked_as_at_the_limit_where_the_largest_size_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference_machines, "MACHINES", ("H100-SXM",))
    monkeypatch.setattr(reference_machines, "load", lambda ref: words())
    (row,) = reached("parameters", Accuracy.ROUNDING).values()
    assert row.at_limit
    assert row.plain_label == row.recommended_label == "15B"


def test_only_built_in_jobs_have_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "paper" in reference_machines.sizes("protein-ss")
    assert reference_machines.sizes("own.py:job") == ()


def test_reach_in_length_ends_at_the_longest_length_that_the_data_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(ref: JobRef) -> Job:
        if ref.size == "paper@2048":
            raise UserError("the text has 9 bytes", allowed="at least 20490")
        return sized(ref)

    monkeypatch.setattr(reference_machines, "load", load)
    found = reached("length", Accuracy.ANY)
    assert {r.recommended for r in found.values()} == {1024.0}
    assert all(r.at_limit for r in found.values())
