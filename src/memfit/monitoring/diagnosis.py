"""Why a training ran out of memory: the answer of an autopsy."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping


class DeathCause(enum.StrEnum):
    """Why a training ended. LATE_GROWTH: it needed more memory after steps that had fitted, and the evidence
    does not say whether because of a leak, a longer sample or something else. OUTSIDE_TORCH: memory of the
    device that torch's allocator does not manage, or other processes. NOT_MEMORY: another reason.
    """

    TENSORS_TOO_LARGE = "tensors-too-large"
    FRAGMENTATION = "fragmentation"
    LEAK = "leak"
    LONGER_SAMPLE = "longer-sample"
    EVALUATION = "evaluation"
    OPTIMIZER_STEP = "optimizer-step"
    CHECKPOINT = "checkpoint"
    LATE_GROWTH = "late-growth"
    OUTSIDE_TORCH = "outside-torch"
    HOST_KILLED = "host-killed"
    SHARED_MEMORY = "shared-memory"
    NOT_MEMORY = "not-memory"
    UNKNOWN = "unknown"


class Certainty(enum.StrEnum):
    """CERTAIN: the evidence states the cause. LIKELY: it fits the cause best, and others remain possible.
    UNKNOWN: it does not say.
    """

    CERTAIN = "certain"
    LIKELY = "likely"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why a training ended, with the evidence.

    ``alternatives``: other causes that the evidence allows. ``memory``: "device", "host" or "" if unknown.
    ``phase``: what ran: "forward", "backward", "optimizer", "evaluation", "save", "load", "build", "data" or
    "". ``line``: innermost line of the user's own code, PATH:LINE. ``module``: attributes of the model that
    the traceback's forward calls went through, such as "decoder.up3". ``evidence``: one sentence each.
    ``figures``: name -> bytes, such as "request_bytes". ``advice``: what to change, the most useful first.
    ``capture``: what to record next time if the evidence is not enough.
    """

    cause: DeathCause
    certainty: Certainty
    evidence: tuple[str, ...]
    alternatives: tuple[DeathCause, ...] = ()
    memory: str = ""
    phase: str = ""
    line: str = ""
    module: str = ""
    figures: Mapping[str, int] = dataclasses.field(default_factory=dict)
    advice: tuple[str, ...] = ()
    capture: tuple[str, ...] = ()

    @property
    def is_out_of_memory(self) -> bool:
        """Whether memory ran out, for whatever reason."""
        return self.cause not in (DeathCause.NOT_MEMORY, DeathCause.UNKNOWN)
