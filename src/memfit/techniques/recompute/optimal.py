"""Optimal recomputation: drop tensors of forward and recompute them in backward, so that the step fits a
memory budget at the least cost of recomputation.

A plan gives the budget. Which tensors are dropped is solved from a trace of the job (cost/recompute_ilp.py).
The choice is then stored in the plan, as its setting ``dropped``, with a checksum of the operators it was
made for, so that the plan means the same at any time and on any machine. Results are bitwise equal (E0).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

OPTIMAL_CHECKPOINTING = "optimal-checkpointing"


def encode_dropped(key: int, dropped: Iterable[int]) -> str:
    """Return the checksum ``key`` of forward's operators, in hexadecimal, and the numbers of the storages to
    drop as text, such as ``0badcafe:3-9,12``. If ``dropped`` is empty, return "none"."""
    runs: list[list[int]] = []
    for number in sorted(dropped):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    numbers_text = ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)
    return f"{key:08x}:{numbers_text}" if numbers_text else "none"


def read_dropped(text: str) -> tuple[int, frozenset[int]]:
    """Return (checksum, numbers of dropped storages) from a text that `encode_dropped` returned. The text
    must not be "none"."""
    key, _, numbers_text = text.partition(":")
    numbers = set[int]()
    for run in numbers_text.split(","):
        first, _, last = run.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return int(key, 16), frozenset(numbers)


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    text = str(settings["dropped"])
    if not text:
        raise UserError(
            "optimal-checkpointing: no tensors to drop have been chosen for its budget of "
            f"{settings['budget_mib']} MiB, because its setting dropped is empty",
            allowed="a plan for which memfit has chosen the tensors",
            hint="memfit.planner.recompute_budget.choose_tensors(job, plan) returns such a plan",
        )
    if text != "none":
        key, numbers = read_dropped(text)
        bench.forward_contexts.append(lambda: _without(key, numbers))


@contextlib.contextmanager
def _without(key: int, numbers: frozenset[int]) -> Iterator[None]:
    from torch.autograd.graph import saved_tensors_hooks

    from memfit.techniques.recompute.selective_recompute import SelectiveRecompute

    recompute_mode = SelectiveRecompute(numbers)
    with saved_tensors_hooks(recompute_mode.pack, recompute_mode.unpack), recompute_mode:
        yield
    if recompute_mode.packed and recompute_mode.key != key:
        raise UserError(
            "optimal-checkpointing: the forward pass runs other operators than those the plan was made for",
            allowed="the same job, device and versions of torch and of the model's library",
            hint="remove the setting dropped of optimal-checkpointing from the plan: memfit then chooses the "
            "tensors again, but not in memfit.apply",
        )


TECHNIQUE = Technique(
    name=OPTIMAL_CHECKPOINTING,
    summary="drop the tensors that cost least to recompute, until the step's peak fits a budget",
    script_call="recompute the operators that plan.yaml names; memfit's own worker does this",
    changes=StepPart.PASSES,
    effect=EffectClass.E0,
    apply=_apply,
    # Not searched: the budget comes from the user or from the search.
    order=95,  # sees the operators that all other techniques leave
    slot="recomputation",
    knobs=(
        Knob(
            name="budget_mib",
            default=1024,
            doc="limit of the memory that all tensors of the step take at its peak, in MiB",
        ),
        Knob(
            name="dropped",
            default="",
            doc="checksum of the operators and numbers of the dropped tensors, as memfit writes them; none: "
            "no tensor is dropped; if left out, memfit chooses the tensors",
            pattern=re.compile(r"(|none|[0-9a-f]{8}:\d+(-\d+)?(,\d+(-\d+)?)*)"),
        ),
    ),
    forbids=(
        "activation-offload",
        "compile",
        "qlora",
        "ddp",
        "fsdp2",
        "zero",
        "sharded-ddp",
        "tensor-parallel",
        "context-parallel",
        "expert-parallel",
        "pipeline",
    ),
)
