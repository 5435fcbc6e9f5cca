"""Models cut to their first blocks, from which many are added up."""

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
    """Builds the job's model with its first ``count`` blocks. A trace does not watch it built."""

    job: Job
    count: int

    def __call__(self) -> torch.nn.Module:
        known = _KNOWN.get(self.job.build_model)
        if known is not None:
            kind, path = known
            with contextlib.suppress(Exception), _hollow_beyond(kind, self.count):
                return keep_blocks(self.job.build_model(), path, self.count)
        return keep_blocks(self.job.build_model(), self.job.blocks, self.count)


# By build_model: (class of the blocks, their path), of models whose blocks alone are of that class.
_KNOWN: weakref.WeakKeyDictionary[Any, tuple[type, str]] = weakref.WeakKeyDictionary()


def remember(job: Job, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        return  # who asked for it says so
    with contextlib.suppress(UserError, TypeError):  # no blocks, or a function that cannot be remembered
        path, blocks = find_blocks(model, job.blocks)
        kind = type(blocks[0])
        if sum(type(m) is kind for m in model.modules()) == len(blocks):
            _KNOWN[job.build_model] = (kind, path)


@contextlib.contextmanager
def _hollow_beyond(kind: Any, count: int) -> Iterator[None]:
    """Only the first ``count`` modules of that class get their parts: building the others, which go at once,
    takes longer than tracing those that stay."""
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
    """The same job whose model keeps its first ``count`` blocks only."""
    return dataclasses.replace(job, build_model=FirstBlocks(job, count))


def keep_blocks(model: torch.nn.Module, path: str | None, count: int) -> torch.nn.Module:
    """The model with its first ``count`` blocks."""
    container = model.get_submodule(find_blocks(model, path)[0])
    assert isinstance(container, CONTAINERS)
    del container[count:]
    model.has_few_blocks = True  # type: ignore[assignment]
    return model
