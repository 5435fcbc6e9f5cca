"""Whole AlphaFold 2 trainings, by the built-in job at the sizes that a row gives."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.model import AlphaFold, published
from memfit.types.job import Job
from published.rows import Setup

# Residues, rows and extra rows of the published stages (supplement, table 4).
_CROPS = {"initial": (256, 128, 1024), "finetune": (384, 512, 5120)}


def fold_job(setup: Setup) -> Job:
    """A step that learns; of recycling there is one pass before it, whose activations are not kept."""
    residues, rows, extra = _crop(setup.row)
    samples = max(1, setup.micro_batch) * setup.micro_batches * setup.ranks["dp"]
    shape = published(residues=residues, rows=rows, extra_rows=extra, batch_size=samples)
    if setup.row["layers"]:
        shape = dataclasses.replace(shape, blocks=int(setup.row["layers"]))
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


def _crop(row: Mapping[str, str]) -> tuple[int, int, int]:
    """What the row says; where it says nothing, the published stage that it names, else the first."""
    text = " ".join(row[c] for c in ("extra_arch", "seq_len")).lower()
    stage = "finetune" if re.search("fine-?tun", f"{row['method']} {row['model']}".lower()) else "initial"
    patterns = (
        r"n_res\s*(\d+)|(\d+)\s*res|crop\D{0,8}(\d+)",
        r"n_seq\s*(\d+)|(?<!extra )(\d+)\s*msa",
        r"extra\D{0,8}(\d+)|(\d+)\s*extra",
    )
    found = [re.search(p, text) for p in patterns]
    told = [int(next(g for g in f.groups() if g)) if f else 0 for f in found]
    residues, rows, extra = (a or b for a, b in zip(told, _CROPS[stage], strict=True))
    return residues, rows, extra
