"""Describe the workload once for every answer: model, parameters, batch x length, machine."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils import _pytree

from memfit.jobs.registry import names
from memfit.model.tensors import check_on_host
from memfit.planner.batch_memory import check_batch_memory
from memfit.planner.stored_predictions import stored_predictions
from memfit.trace.tracer import fake_model
from memfit.types.job import Job, JobRef
from memfit.types.workload import Workload


def workload_of(job: Job, machine: str = "") -> Workload:
    """Return the job's workload: model, number of parameters, batch size over all ranks, length or shape of a
    sample, which of "batch" and "length" the user did not set, and the machine.

    The model is built without memory to count its parameters. If the job gives no number of tokens, the
    length or shape is that of a sample of its first batch; UserError is raised if that batch has tensors
    outside the host's memory. ``machine``: the machine's name; "" for none.
    """
    length = job.tokens_per_batch // job.batch_size if job.batch_size > 0 else 0
    workload = Workload(
        model=_model(job),
        parameter_count=sum(p.numel() for p in fake_model(job).parameters()),
        batch_size=job.batch_size,
        length=length or None,
        length_unit=job.length_unit,
        assumed=job.assumed,
        machine=machine,
    )
    return workload if length else _with_shape(workload, job)


def stored_workload(ref: JobRef, job: Job, machine: str = "") -> Workload:
    """Return the workload (`workload_of`) of the job that ``ref`` names and `load` has returned. That of a
    built-in job is read from disk if it is there, because building its model takes seconds; if not, raises
    UserError as `check_batch_memory` does. ``machine``: the machine's name; "" for none."""

    def compute() -> Workload:
        check_batch_memory(ref)
        return workload_of(job, machine)

    stored = stored_predictions(ref, job) if ref.spec in names() else None
    return stored.get_or_compute(Workload, compute, "workload", machine) if stored else compute()


def _model(job: Job) -> str:
    """Return the name by which answers call the model: the job's name and its size, such as ``protein-lm
    650M``.

    Only the name is returned for Hugging Face jobs ("hf:..."), whose model the size does not change, and if
    the size is "tiny", the default. What follows "@" in a size is omitted.
    """
    size = job.size.partition("@")[0]
    return job.name if size in ("tiny", "") or job.name.startswith("hf:") else f"{job.name} {size}"


def _with_shape(workload: Workload, job: Job) -> Workload:
    """Return the workload with the shape of a sample: that of the batch's largest tensor without its first
    dimension. If that is one-dimensional and of integers, its size is set as the length instead of a shape.

    Only tensors with at least two dimensions count. If the batch has none, the workload is returned
    unchanged. Raises UserError if the batch has tensors outside the host's memory.
    """
    leaves = _pytree.tree_leaves(check_on_host(job.make_batch(0, 0)))
    samples = [t for t in leaves if isinstance(t, torch.Tensor) and t.dim() > 1]
    if not samples:
        return workload
    largest = max(samples, key=torch.Tensor.numel)
    shape = tuple(largest.shape[1:])
    if len(shape) == 1 and not largest.is_floating_point():
        return dataclasses.replace(workload, length=shape[0])
    return dataclasses.replace(workload, sample_shape=shape)
