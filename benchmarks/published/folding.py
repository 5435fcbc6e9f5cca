"""Whole AlphaFold 2 trainings, by the built-in job at the sizes that a row gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.model import AlphaFold, published_size
from memfit.types.errors import UserError
from memfit.types.job import Job
from published.rows import Setup


def fold_job(setup: Setup) -> Job:
    """A step that learns; of recycling there is one pass before it, whose activations are not kept."""
    if missing := [k for k in ("residues", "sequences", "extra") if k not in setup.fold]:
        raise UserError(f"the row's fold gives no {', '.join(missing)}")
    residues, rows, extra = (int(setup.fold[k]) for k in ("residues", "sequences", "extra"))
    samples = max(1, setup.micro_batch) * setup.micro_batches * setup.ranks["dp"]
    shape = published_size(residues=residues, rows=rows, extra_rows=extra, batch_size=samples)
    if setup.layers:
        shape = dataclasses.replace(shape, blocks=setup.layers)
    folds = alphafold2.built_in_folds()

    def batch(step: int, seed: int) -> dict[str, Any]:
        return alphafold2.train_batch(folds, shape, step=step, seed=seed)

    def build() -> torch.nn.Module:
        return AlphaFold(shape)

    return Job(
        name=setup.id,
        build_model=build,
        make_batch=batch,
        loss=alphafold2.loss,
        batch_size=samples,
        blocks="blocks",
        more_blocks=("extra", "template.blocks"),
        islands=("structure", "recycle", "heads"),
    )
