"""What is asked of the process that runs a script, and what it answers."""

from __future__ import annotations

import dataclasses

from memfit.planner.selection import Objective
from memfit.types.plan import Accuracy
from memfit.types.result import Estimate, SearchResult
from memfit.types.trace import Trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSearch:
    """What plans to search for a script's step. ``without``: techniques to leave out; the other fields are
    those of `planner.request.Request`."""

    cap_bytes: int | None = None
    goal: Objective = Objective.FASTEST
    accuracy: Accuracy = Accuracy.ROUNDING
    without: tuple[str, ...] = ()
    within_s: float = 60.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptSpec:
    """A script to trace. ``command``: the command that starts it. ``machine``: the machine for which its
    memory is predicted, as in `memfit.inputs.machine_of`. ``answer``: the file for the `ScriptAnswer`.
    ``scratch``: an empty folder for copies of files that the script changes (`sandboxed`). ``bound``: as in
    `Job`. ``search``: what plans to search, or None. ``probe``: whether workspaces of kernels may be
    measured, which is done if ``machine`` is this machine's CPU. ``whole_trace``: whether the answer holds
    all allocations, not only those that are alive at the peak. ``case``: which values are assumed where a run
    would have them (`memfit.trace.assumed_values.AssumedCase`)."""

    command: tuple[str, ...]
    machine: str
    answer: str = ""
    scratch: str = ""
    bound: int | float | dict[str, int | float] | None = None
    search: PlanSearch | None = None
    probe: bool = True
    whole_trace: bool = False
    case: str = "usual"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptAnswer:
    """What is known of a script's training steps. ``estimate``, ``trace`` and ``peak_clock`` are None if no
    step could be traced; ``problem`` then says why. ``notes``: what the script was kept from, and what is
    assumed. ``plans``: the searched plans. They are None if none were asked for, and if none can be searched,
    for the reason in ``no_plans``. ``batch_size``: samples of a step, 0 without ``plans``.
    ``steps``: the most updates that an optimizer made in the traced steps. ``micro_batches``: backward passes
    of the last update. ``before_training_bytes``: peak of live tensors while the model was built and
    evaluated, before its first training step. ``evaluation_bytes``: the same of an evaluation after the
    traced steps, if that needs more than a step; else 0. ``shared_bytes``: of batches of worker processes in
    shared memory, which are not in the estimate's peak; 0 if the machine's device is an accelerator.
    ``growth_bytes``: by how much memory of the device grows with each step, because the script keeps tensors
    of earlier steps; 0 if it does not.
    """

    program: str
    estimate: Estimate | None = None
    trace: Trace | None = None
    peak_clock: int | None = None
    model: str = ""
    optimizers: tuple[str, ...] = ()
    steps: int = 0
    micro_batches: int = 1
    ranks: int = 1
    problem: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    plans: SearchResult | None = None
    no_plans: str = ""
    batch_size: int = 0
    before_training_bytes: int = 0
    evaluation_bytes: int = 0
    shared_bytes: int = 0
    growth_bytes: int = 0
