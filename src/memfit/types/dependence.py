"""Whether the samples of a batch can be trained separately, and what splitting the batch would change."""

from __future__ import annotations

import dataclasses
import enum


class DependenceKind(enum.StrEnum):
    """Result of the test whether the samples of a batch depend on each other: "independent", "dependent" or
    "not tested".
    """

    INDEPENDENT = "independent"
    DEPENDENT = "dependent"
    NOT_TESTED = "not tested"


class DependenceCause(enum.StrEnum):
    """What depends on the other samples of the batch: "" (nothing, or it is not known), statistics
    ("batch-norm", "sync-batch-norm"), a state that a forward pass changes ("state"), the loss or anything
    before it ("loss"), the weights of the loss terms ("weights": the loss is a sum, or a mean over other
    terms than the job counts), or whether the step can be computed ("size": it fails on a part of the batch).
    """

    NONE = ""
    BATCH_NORM = "batch-norm"
    SYNC_BATCH_NORM = "sync-batch-norm"
    STATE = "state"
    LOSS = "loss"
    WEIGHTS = "weights"
    SIZE = "size"


_CHANGES = {
    DependenceCause.BATCH_NORM: "changes BatchNorm's statistics",
    DependenceCause.SYNC_BATCH_NORM: "changes SyncBatchNorm's statistics in micro-batches",
    DependenceCause.STATE: "changes the state that a forward pass updates",
    DependenceCause.LOSS: "changes the loss, which compares samples of a batch",
    DependenceCause.WEIGHTS: "weights the terms of the loss incorrectly",
    DependenceCause.SIZE: "fails, since the step can be computed for the whole batch only",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleDependence:
    """Result of the test of one job whether the samples of its batch depend on each other.

    ``kind``: the result. ``cause``: what depends on other samples. ``reason``: in one line, how this is known
    or why it was not tested. ``modules``: paths of the BatchNorm layers that are the cause, or of the state
    that changes (path of the module and name of the attribute); () for other causes. ``across_ranks``:
    whether splitting the batch over data-parallel ranks changes the training, too; False if only
    micro-batches do.
    """

    kind: DependenceKind
    cause: DependenceCause = DependenceCause.NONE
    reason: str = ""
    modules: tuple[str, ...] = ()
    across_ranks: bool = True

    @property
    def changes(self) -> str:
        """What splitting the batch does to the training, such as "changes BatchNorm's statistics"; "" without
        a cause.
        """
        return _CHANGES.get(self.cause, "")

    @property
    def sentence(self) -> str:
        """The objection to a plan that splits the batch: if samples are dependent, what splitting does to the
        training, why, and what to use instead; if not tested, that and why. "" if the samples are
        independent.
        """
        if self.kind is DependenceKind.NOT_TESTED:
            return f"not tested whether samples of a batch depend on each other ({self.reason})"
        if self.kind is DependenceKind.DEPENDENT:
            return f"splitting the batch {self.changes} ({self.reason}); instead, use {self.way_out}"
        return ""

    @property
    def way_out(self) -> str:
        """What to use instead of a plan that splits the batch, in words; it depends on the cause."""
        if self.cause is DependenceCause.BATCH_NORM:
            return "SyncBatchNorm for data-parallel ranks, no micro-batches"
        if self.cause is DependenceCause.WEIGHTS:
            return "a mean over the terms, with Job(loss_terms=...) returning the number of terms in a part"
        return "a plan that does not split the batch"
