"""What the scripts of `test_handover.py` say of themselves: one line of JSON a rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from parts import CLIP

import memfit
from memfit.types.conformance import NotConforming


def report(model: Any, optimizer: Any, *, careless: Callable[[], None], step: Callable[[], None]) -> None:
    """Conformance of a step that leaves out what no file applies, then of the whole step."""
    try:
        memfit.conform(model, optimizer, "plan.yaml", step=careless, blocks="blocks", clip=CLIP)
        differences = []
    except NotConforming as error:
        differences = [d.feature for d in error.found.differences]
    found = memfit.conform(model, optimizer, "plan.yaml", step=step, blocks="blocks", clip=CLIP)
    told = {"careless": differences, "checked": found.checked, "unseen": found.unseen}
    print(json.dumps({"event": "handover", **told}))
