"""A job with fewer of its repeated blocks, so that one block's share can be told from the rest."""

from __future__ import annotations

import dataclasses

import torch

from memfit.techniques.blocks import find_blocks
from memfit.types.job import Job


def with_blocks(job: Job, count: int) -> Job:
    """The same job whose model keeps its first ``count`` blocks only."""

    def build() -> torch.nn.Module:
        model = job.build_model()
        path, _ = find_blocks(model, job.blocks)
        container = model.get_submodule(path)
        assert isinstance(container, torch.nn.ModuleList | torch.nn.Sequential)
        del container[count:]
        return model

    return dataclasses.replace(job, build_model=build)
