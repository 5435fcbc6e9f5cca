"""One Evoformer block of AlphaFold 2 at its published crops, as jobs: initial training and fine-tuning."""

from __future__ import annotations

from typing import Any

import torch

from memfit import Job
from memfit.jobs.builtin.alphafold.evoformer import EvoformerBlock
from memfit.jobs.builtin.alphafold.model import published_size


def _block(residues: int, rows: int) -> Job:
    widths = published_size(residues=residues, rows=rows, extra_rows=rows, batch_size=1).widths

    def make_batch(step: int, seed: int) -> list[torch.Tensor]:
        numbers = torch.Generator().manual_seed(1000 * seed + step)
        m = torch.randn(1, rows, residues, widths.c_m, generator=numbers)
        z = torch.randn(1, residues, residues, widths.c_z, generator=numbers)
        return [m, z, torch.ones(1, rows, residues), torch.ones(1, residues, residues)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        m, z = model(*batch)
        return m.square().mean() + z.square().mean()  # type: ignore[no-any-return]

    return Job(
        name=f"evoformer-{residues}",
        build_model=lambda: EvoformerBlock(widths),
        make_batch=make_batch,
        loss=loss,
        batch_size=1,
    )


def initial_training() -> Job:
    """256 residues, 128 rows of the alignment."""
    return _block(256, 128)


def fine_tuning() -> Job:
    """384 residues, 512 rows of the alignment."""
    return _block(384, 512)


def initial_training_rehearsal() -> Job:
    """A crop that a processor trains in a second."""
    return _block(16, 8)


def fine_tuning_rehearsal() -> Job:
    """A crop that is larger, as that of fine-tuning is."""
    return _block(24, 16)
