"""The engine replay, which does not train: it answers with the stored record of an earlier run."""

from __future__ import annotations

from memfit.engines.base import Engine
from memfit.techniques.registry import TECHNIQUES

ENGINE = Engine(
    name="replay",
    summary="answers from the store: the last run of the same job, plan and seed",
    carries=frozenset(TECHNIQUES),
    applied_by_files=frozenset(),
)
