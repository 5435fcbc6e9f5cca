"""Whether the batch of a job fits this machine's memory, where memfit makes it to predict a step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Final

from memfit.jobs import huggingface
from memfit.jobs.registry import load, names
from memfit.model.batch_objects import batch_tensors
from memfit.runtime import local_machine
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.serialization import dumps, loads
from memfit.types.units import format_bytes

_FREE_SHARE: Final = 3  # a prediction holds up to 2.2 times the bytes of a batch (weather, paper, fsdp2)


def check_batch_memory(ref: JobRef) -> None:
    """Raise UserError if ``ref`` states a batch of a built-in or Hugging Face job whose samples take more
    than a third of this machine's free memory. One sample is made to know its bytes, once in a process for
    each size of a job. Nothing is checked for the user's jobs and if ``ref`` states no batch."""
    if ref.batch is None or not (ref.spec in names() or ref.spec.startswith(huggingface.PREFIX)):
        return
    sample_bytes = _sample_bytes(dumps(dataclasses.replace(ref, batch=1)))
    free_bytes = local_machine.free_bytes()
    most_samples = free_bytes // _FREE_SHARE // max(sample_bytes, 1)
    if ref.batch > most_samples:
        raise UserError(
            f"--batch {ref.batch}: to predict a step of {ref.spec}, memfit makes its batch in this machine's "
            f"memory, of which it takes {format_bytes(ref.batch * sample_bytes)}, more than a third of the "
            f"{format_bytes(free_bytes)} that are free",
            allowed=f"at most {most_samples} samples of {format_bytes(sample_bytes)} each, over all ranks"
            if most_samples
            else "none of this size",
            hint="predict it on a machine with more memory, or predict a smaller batch on fewer devices",
        )


@functools.cache
def _sample_bytes(plain_ref: str) -> int:
    batch = load(loads(JobRef, plain_ref)).make_batch(0, 0)
    return sum(tensor.numel() * tensor.element_size() for tensor in batch_tensors(batch))
