"""Models cut to their first blocks, from whose traces those of deeper models are built."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from memfit.model.blocks import find_blocks
from memfit.types.errors import UserError
from memfit.types.job import Job

CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential)


@dataclasses.dataclass(frozen=True, slots=True)
class FirstBlocks:
    """A ``build_model`` for a job: called without arguments, it builds the model of ``job`` with its first
    ``count`` blocks only. A trace does not record the construction of such a model."""

    job: Job
    count: int

    def __call__(self) -> torch.nn.Module:
        entry = _KNOWN.get(self.job.build_model)
        if entry is not None:
            kind, path = entry
            with contextlib.suppress(Exception), _hollow_beyond(kind, self.count):
                return keep_blocks(self.job.build_model(), path, self.count)
        return keep_blocks(self.job.build_model(), self.job.blocks, self.count)


# build_model -> (class of the blocks, their path), for models in which only the blocks have that class.
_KNOWN: weakref.WeakKeyDictionary[Any, tuple[type, str]] = weakref.WeakKeyDictionary()


def remember(job: Job, model: object) -> None:
    """Remember the class and path of the model's blocks for the job's ``build_model``, so that `FirstBlocks`
    need not build the blocks that it drops. Do nothing if the model has no blocks or if other modules have
    their class."""
    if not isinstance(model, torch.nn.Module):
        return  # the caller reports the error
    with contextlib.suppress(UserError, TypeError):  # no blocks, or a function that cannot be remembered
        path, blocks = find_blocks(model, job.blocks)
        kind = type(blocks[0])
        if sum(type(m) is kind for m in model.modules()) == len(blocks):
            _KNOWN[job.build_model] = (kind, path)


@contextlib.contextmanager
def _hollow_beyond(kind: Any, count: int) -> Iterator[None]:
    """Inside this context, let only the first ``count`` modules of class ``kind`` (not of subclasses) that
    are made build their contents; later ones stay empty. The caller drops these, and building them takes
    longer than tracing those that stay."""
    inner, made = kind.__init__, 0

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal made
        if type(self) is kind:
            made += 1
        if type(self) is kind and made > count:
            torch.nn.Module.__init__(self)
        else:
            inner(self, *args, **kwargs)

    with mock.patch.object(kind, "__init__", init):
        yield


def with_blocks(job: Job, count: int) -> Job:
    """Return the same job with a model that keeps only its first ``count`` blocks (all, if it has no more).
    The model is cut when it is built (`FirstBlocks`)."""
    return dataclasses.replace(job, build_model=FirstBlocks(job, count))


def keep_blocks(model: torch.nn.Module, path: str | None, count: int) -> torch.nn.Module:
    """Remove all but the first ``count`` blocks from the model, set its attribute ``has_few_blocks`` to True,
    and return it. ``path`` is the path of the module that contains the blocks, or None to find it
    (`find_blocks`). Raises UserError if there are no blocks, and AssertionError if they do not lie in a
    ModuleList or Sequential."""
    container = model.get_submodule(find_blocks(model, path)[0])
    assert isinstance(container, CONTAINERS)
    del container[count:]
    model.has_few_blocks = True  # type: ignore[assignment]
    return model
