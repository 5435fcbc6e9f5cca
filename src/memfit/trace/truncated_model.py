"""Models cut to their first blocks, from whose traces those of deeper models are built."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import weakref
from collections.abc import Iterator, Sequence
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
    ``count`` blocks only, and with the first ``count`` ones of the containers at the paths ``others``. Raises
    what `keep_blocks` raises. A trace does not record the construction of such a model."""

    job: Job
    count: int
    others: tuple[str, ...] = ()

    @property
    def origin(self) -> Any:
        """The function that builds the whole model."""
        return self.job.build_model

    def __call__(self) -> torch.nn.Module:
        model = self._built()
        for path in self.others:
            model = keep_blocks(model, path, self.count)
        return model

    def _built(self) -> torch.nn.Module:
        entry = _KNOWN.get(self.job.build_model)
        if entry is not None:
            with contextlib.suppress(Exception), _hollow_beyond(entry, self.count):
                return keep_blocks(self.job.build_model(), entry.path, self.count)
        return keep_blocks(self.job.build_model(), self.job.blocks, self.count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """How a model's blocks are built: ``count`` modules of the class ``kind``, with no other of that class
    between them, after ``first`` others of that class. ``path``: of the module that contains the blocks."""

    kind: type
    path: str
    first: int
    count: int


_KNOWN: weakref.WeakKeyDictionary[Any, _Built] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def note_modules(order: list[torch.nn.Module]) -> Iterator[None]:
    """Inside this context, append to ``order`` each module when its construction begins."""
    inner = torch.nn.Module.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        order.append(self)
        inner(self, *args, **kwargs)

    with mock.patch.object(torch.nn.Module, "__init__", init):
        yield


def remember_blocks(job: Job, model: object, order: Sequence[torch.nn.Module]) -> None:
    """Remember how the job's ``build_model``, which has returned ``model``, builds the blocks, so that
    `FirstBlocks` need not build those that it drops. ``order``: the modules in the order of their
    construction. Do nothing if the model has no blocks, if it does not build them one after another, or if
    ``build_model`` cannot be a weak key."""
    if not isinstance(model, torch.nn.Module):
        return  # the caller reports the error
    with contextlib.suppress(UserError, TypeError):  # no blocks, or a function that cannot be remembered
        path, blocks = find_blocks(model, job.blocks)
        kind = type(blocks[0])
        alike = [module for module in order if type(module) is kind]
        first = next((i for i, module in enumerate(alike) if module is blocks[0]), len(alike))
        built = alike[first : first + len(blocks)]
        if len(built) == len(blocks) and all(map(operator.is_, built, blocks)):
            _KNOWN[job.build_model] = _Built(kind=kind, path=path, first=first, count=len(blocks))


@contextlib.contextmanager
def _hollow_beyond(built: _Built, count: int) -> Iterator[None]:
    """Inside this context, let only the first ``count`` of the blocks build their contents; later ones stay
    empty. The caller drops these, and building them takes longer than tracing those that stay. Subclasses of
    the blocks' class, and other modules of it, build theirs."""
    kind: Any = built.kind
    inner, built_count = kind.__init__, 0
    hollow = range(built.first + count, built.first + built.count)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal built_count
        index = built_count if type(self) is kind else -1
        built_count += type(self) is kind
        if index in hollow:
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
