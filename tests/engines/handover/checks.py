"""What the scripts of `test_handover.py` report: one line of JSON per rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

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


def leave() -> NoReturn:
    """End this rank at once, with code 0.

    A gloo thread that outlives its group can ask for the interpreter's lock while the interpreter ends. That
    aborts the process: "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
