"""What a job trains, said once for every answer: model, parameters, batch x length, machine."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils import _pytree

from memfit.trace.tracer import fake_model
from memfit.types.job import Job
from memfit.types.workload import Workload


def workload_of(job: Job, machine: str = "") -> Workload:
    """Builds the model without memory to count its parameters, and a batch where the job names no length."""
    length = job.tokens_per_batch // job.batch_size if job.batch_size > 0 else 0
    found = Workload(
        model=_model(job),
        parameter_count=sum(p.numel() for p in fake_model(job).parameters()),
        batch_size=job.batch_size,
        length=length or None,
        length_unit=job.length_unit,
        assumed=job.assumed,
        machine=machine,
    )
    return found if length else _with_shape(found, job)


def _model(job: Job) -> str:
    """``protein-lm 650M``. The size of a Hugging Face job changes no model, "tiny" is everybody's default."""
    size = job.size.partition("@")[0]
    return job.name if size in ("tiny", "") or job.name.startswith("hf:") else f"{job.name} {size}"


def _with_shape(workload: Workload, job: Job) -> Workload:
    """With the shape of a sample: that of whole numbers in rows is a length."""
    leaves = _pytree.tree_leaves(job.make_batch(0, 0))
    samples = [t for t in leaves if isinstance(t, torch.Tensor) and t.dim() > 1]
    if not samples:
        return workload
    largest = max(samples, key=torch.Tensor.numel)
    shape = tuple(largest.shape[1:])
    if len(shape) == 1 and not largest.is_floating_point():
        return dataclasses.replace(workload, length=shape[0])
    return dataclasses.replace(workload, sample_shape=shape)
