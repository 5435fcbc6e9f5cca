"""SIZE@LENGTH of built-in jobs, and a batch that plain training can run here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from memfit.jobs.registry import load
from memfit.planner import capacity, search
from memfit.planner.request import Request, make_predictor
from memfit.runtime import local_machine
from memfit.techniques.registry import make_plain_plan
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan


@pytest.mark.parametrize("spec", ["protein-ss", "protein-lm", "char-lm"])
def test_a_length_makes_batches_of_that_length(spec: str) -> None:
    job = load(JobRef(spec=spec, size="tiny@64", batch=2))
    assert job.size == "tiny@64"
    first = next(iter(job.make_batch(0, 0).values()))
    assert first.shape[:2] == (2, 64)


@pytest.mark.parametrize("size", ["tiny@", "tiny@x", "tiny@0", "tiny@999999999", "huge@64"])
def test_invalid_sizes_and_lengths_are_refused(size: str) -> None:
    with pytest.raises(UserError, match=r"size|length"):
        load(JobRef(spec="protein-ss", size=size))


def test_two_different_lengths_are_refused() -> None:
    assert load(JobRef(spec="hf:gpt2", size="tiny@64", length=64)).tokens_per_batch == 4 * 64
    with pytest.raises(UserError, match="only one of them"):
        load(JobRef(spec="hf:gpt2", size="tiny@64", length=65))


def test_the_batch_is_halved_until_plain_training_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(job_ref=JobRef(spec="protein-ss", batch=8), machine=local_machine.this_machine("world"))
    job, predictor = make_predictor(request)
    plain = predictor.whole(Plan())
    need = capacity.needed_bytes(plain, request.machine)
    monkeypatch.setattr(local_machine, "free_bytes", lambda: need // 2)
    smaller, job, _, estimate = search._reduce_batch(request, job, predictor, plain)
    assert smaller.job_ref == dataclasses.replace(request.job_ref, batch=job.batch_size)
    assert job.batch_size in (2, 4)
    assert capacity.needed_bytes(estimate, request.machine) <= need // 2


def test_the_batch_is_not_reduced_below_one_sample_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = local_machine.this_machine("world")
    request = Request(job_ref=JobRef(spec="protein-ss", batch=3), machine=machine, ranks=2)
    job, predictor = make_predictor(request)
    between_bytes = 10 * 2**20  # less than the training needs, more than its batch
    monkeypatch.setattr(local_machine, "free_bytes", lambda: between_bytes)
    _, job, *_ = search._reduce_batch(request, job, predictor, predictor.whole(make_plain_plan(2)))
    assert job.batch_size == 2


def test_a_job_whose_batch_cannot_be_halved_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from tiny import words\njob = words()\n")
    machine = local_machine.this_machine("world", "cpu")
    request = Request(job_ref=JobRef(spec=f"{mine}:job"), machine=machine)
    job, predictor = make_predictor(request)
    monkeypatch.setattr(local_machine, "free_bytes", lambda: 1)
    with pytest.raises(UserError, match=r"does not fit the free memory .*halved: .* does not accept --batch"):
        search._reduce_batch(request, job, predictor, predictor.whole(Plan()))
