"""The small traces from which a search for many devices takes the costs of parts of the model: of three
blocks and one or two samples, on tensor-, context- and expert-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from memfit.cost.host import HostTensors
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import attribute_period, child_prefix, find_blocks, find_stacks
from memfit.model.tensors import tensor_leaves
from memfit.planner.block_costs import BLOCKS, Seconds, parts_of, update_costs_of
from memfit.planner.parallelism_grid import Uses
from memfit.techniques.base import OptimizerLike
from memfit.techniques.parallel.axial_parallel import axial_modules
from memfit.techniques.parallel.expert_parallel import count_experts, find_mixtures
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import are_alike
from memfit.trace.trace_pool import run_parallel
from memfit.trace.tracer import fake_model, trace, use_step
from memfit.trace.truncated_model import CONTAINERS, FirstBlocks
from memfit.types.errors import UserError, first_line
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Job
from memfit.types.parts import Parts, UpdateCosts
from memfit.types.plan import KnobValue, Plan
from memfit.types.trace import Trace

_PRECISION: dict[str, Uses] = {
    "fp32": (),
    "autocast": (make_use("bf16-autocast", {}),),
    "bf16": (make_use("bf16-parameters", {"rounding": "master"}),),
}


_DROPLESS: dict[str, KnobValue] = {"dropless": True}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Identifies one small trace: of a plan on ``tensor`` x ``context`` x ``experts`` ranks, with three
    blocks of the model.

    ``tensor``, ``context``, ``experts``: degrees of tensor, context and expert parallelism. ``sequence``,
    ``vocabulary``: the settings of these names of the technique tensor-parallel. ``compute``: precision,
    "fp32", "autocast" or "bf16". ``uses``: the plan's techniques beside parallelism and precision.
    ``samples``: number of samples in the micro-batch of a rank.
    """

    tensor: int
    sequence: bool
    vocabulary: str
    context: int
    compute: str
    uses: Uses
    samples: int
    experts: int = 1


class BlockTracer:
    """Makes small traces of one job for one kind of device (torch's name, such as "cuda"), and returns the
    costs of the model's pieces that are seen in them.

    The traces are cached. ``outcomes``: each trace of three blocks by its `Key`, or the text of the error
    that tracing raised. ``updates``: the traces of the optimizer's step with one block and with two, by the
    set of techniques under which they were made.

    ``chains``: path of each stack of blocks that is predicted block by block -> number of its blocks; first
    the model's main stack (`find_blocks`). Where there are several, such as an encoder's and a decoder's,
    "block" is the mean over all their blocks. ``blocks``: number of blocks in all chains.
    ``is_single_chain``: whether there is one chain, of blocks that are all alike, as pipeline and context
    parallelism need. ``experts``: number of experts of a mixture, the greatest common divisor if mixtures
    differ; 0 if the model has none, or some outside the main stack. ``expert_elements``: number of their
    trained elements in an average block. ``sharing``: the technique by which context-parallel ranks divide
    each sample of this model.

    Creating a BlockTracer raises UserError if the model has no repeated blocks, or none where the job says
    that they are.
    """

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        model = fake_model(job)
        self.chains = find_chains(model, job)
        self.path = next(iter(self.chains))
        self.blocks = sum(self.chains.values())
        main_blocks = find_blocks(model, job.blocks)[1]
        alike = are_alike(model, self.path, main_blocks, job)
        self.is_single_chain = len(self.chains) == 1 and alike
        self.tensors = sum(p.requires_grad for p in model.parameters())
        self.sharing = "axial-parallel" if axial_modules(model) else "context-parallel"
        self.experts, self.expert_elements = _experts(model, job, self.path, self.chains[self.path])
        self.outcomes: dict[Key, Trace | str] = {}
        self.updates: dict[Uses, tuple[Trace, Trace]] = {}
        self.model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        self._batch = job.make_batch(0, 0)  # made once, with real tensors

    def host_tensors(self, kept_bytes: float) -> HostTensors:
        """Return what a rank needs of host memory for tensors if it keeps ``kept_bytes`` there during a step,
        for example of offloaded activations. The job's whole batch counts as its inputs, although
        data-parallel ranks divide it."""
        batch_bytes = sum(t.numel() * t.element_size() for t in tensor_leaves(self._batch))
        return HostTensors(
            is_sketch=True,
            kept_bytes=kept_bytes,
            building_bytes=0.0,
            model_bytes=self.model_bytes,
            batch_bytes=batch_bytes,
        )

    def parts(self, key: Key, seconds: Seconds) -> Parts:
        """Return the costs of the model's pieces in the trace ``key``, which is made if it is not cached.

        ``seconds`` returns the total time of a sequence of operators. Raises UserError if the trace could not
        be made, for example because the model cannot be divided by the degree, or if the blocks do not run
        one after the other.
        """
        self.trace([key])
        result = self.outcomes[key]
        if isinstance(result, str):
            raise UserError(result)
        return parts_of(result, self.chains, seconds)

    @functools.cache  # noqa: B019  lives as long as one search
    def hidden_bytes(self, compute: str) -> float:
        """Return the bytes of one sample's hidden state between two blocks, in the precision ``compute``
        ("fp32", "autocast" or "bf16"): what a block that is recomputed in backward keeps from forward to
        backward. Raises UserError if the trace cannot be made, or if the blocks do not run one after the
        other."""
        key = Key(
            tensor=1,
            sequence=False,
            vocabulary="whole",
            context=1,
            compute=compute,
            uses=(make_use("activation-checkpointing", {"every": 1}),),
            samples=1,
        )
        return self.parts(key, lambda ops: 0.0).block.kept_bytes

    def update_costs(self, uses: Uses, seconds: Seconds) -> UpdateCosts:
        """Return the costs of the optimizer's step under these techniques, per trainable element
        (`update_costs_of`). The traces are made if they are not cached; if one fails, its error is raised."""
        if uses not in self.updates:
            self.trace((), [uses])
        return update_costs_of(*self.updates[uses], seconds)

    def trace(self, keys: Iterable[Key], updates: Sequence[Uses] = ()) -> None:
        """Make, in parallel, the trace of each of ``keys``, and two traces of the optimizer's step (with one
        block and with two) under each set of techniques in ``updates``. Cached ones are not made again.

        If a trace of ``keys`` fails, the error's text is cached in its place. If one of ``updates`` fails,
        its error is raised. Traces with torch.compile and those of ``updates`` are made first, and those of
        several ranks last, because they load parts of torch that the others do not need.
        """
        tasks: list[tuple[int, dict[Any, Any], Any, Callable[[Any], Any]]] = [
            (_trace_order(key), self.outcomes, key, self._trace_blocks)
            for key in dict.fromkeys(keys)
            if key not in self.outcomes
        ]
        tasks += [
            (-1, self.updates, uses, self._trace_updates)
            for uses in dict.fromkeys(updates)
            if uses not in self.updates
        ]
        tasks.sort(key=lambda task: task[0])
        with pause_gc():
            results = run_parallel([functools.partial(make, task_key) for _, _, task_key, make in tasks])
        for (_, cache, task_key, _), result in zip(tasks, results, strict=True):
            cache[task_key] = result

    def _trace_updates(self, uses: Uses) -> tuple[Trace, Trace]:
        single, double = (
            trace(self._small(1, blocks), Plan(uses=uses), device=self.device, steps=2) for blocks in (1, 2)
        )
        return single, double

    def _trace_blocks(self, key: Key) -> Trace | str:
        uses: list[Any] = [*_PRECISION[key.compute], *key.uses]
        if key.tensor > 1:
            knobs = {"degree": key.tensor, "sequence": key.sequence, "vocabulary": key.vocabulary}
            uses.append(make_use("tensor-parallel", knobs))
        if key.context > 1:
            uses.append(make_use(self.sharing, {"degree": key.context}))
        if key.experts > 1:
            uses += [make_use("ddp", {}), make_use("expert-parallel", _DROPLESS | {"degree": key.experts})]
        plan = Plan(uses=tuple(uses), ranks=key.tensor * key.context * key.experts)
        try:
            with use_step(_WithoutAveraging):
                return trace(
                    self._small(key.samples * key.experts, BLOCKS),
                    plan,
                    device=self.device,
                    steps=1,
                    max_micro_batches=1,
                    update=False,
                )
        except UserError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  a trace that fails is left out, and the others go on
            return first_line(error)[:200]

    def _small(self, samples: int, blocks: int) -> Job:
        return dataclasses.replace(
            self.job,
            batch_size=samples,
            make_batch=_FirstSamples(self._batch, self.job.batch_size, samples),
            build_model=FirstBlocks(self.job, blocks, tuple(self.chains)[1:]),
        )


def find_chains(model: torch.nn.Module, job: Job) -> dict[str, int]:
    """Return the module path of each stack of blocks that can be predicted block by block -> the number of
    its blocks. The first is the main stack: that at the job's ``blocks`` or, if the job names none, the one
    with the most parameters. Other stacks follow if they have at least 3 blocks, alike but for the first
    (`is_chain`), and at least a quarter of the main stack's parameters; smaller ones are predicted with what
    runs before or after the blocks. Raises UserError if there is no main stack."""
    main_path, main_blocks = find_blocks(model, job.blocks)
    chains = {main_path: len(main_blocks)}
    for path, blocks in find_stacks(model, job.blocks).items():
        is_large = 4 * _elements(blocks) >= _elements(main_blocks)
        if path != main_path and is_large and is_chain(model, path, blocks, job):
            chains[path] = len(blocks)
    return chains


def is_chain(model: torch.nn.Module, path: str, blocks: Sequence[torch.nn.Module], job: Job) -> bool:
    """Return whether a trace of the first blocks at ``path`` may stand for all of them: there are at least 3
    (`BLOCKS`), in a ModuleList or Sequential, and all but the first have parameters of the same names and
    shapes, and the same numbers, bools and strings as attributes. The first may have more, as T5's has a
    table of relative positions."""
    is_cuttable = len(blocks) >= BLOCKS and isinstance(model.get_submodule(path), CONTAINERS)
    return (
        is_cuttable
        and are_alike(model, path, blocks, job, first=1)
        and attribute_period(blocks, first=1) == 1
    )


def is_main_chain(job: Job) -> bool:
    """Return whether a trace of the first blocks of the model's main stack (`find_blocks`) may stand for all
    of them (`is_chain`). False if the model has no such stack."""
    model = fake_model(job)
    try:
        path, blocks = find_blocks(model, job.blocks)
    except UserError:
        return False
    return is_chain(model, path, blocks, job)


def _elements(blocks: Sequence[torch.nn.Module]) -> int:
    return sum(p.numel() for block in blocks for p in block.parameters())


class _WithoutAveraging(TrainingStep):
    """A training step that does not average gradients over ranks: the ranks of ddp, which small traces of
    expert-parallel plans have only because its ranks see different samples, and those that share a sample.
    Data parallelism does both in the plans that are composed of these traces, where it is added."""

    carried = frozenset({"ddp"})

    def _prepare(self) -> OptimizerLike:
        self.bench.before_micro_batch.clear()  # context- and axial-parallel would begin to average there
        return super()._prepare()


def _experts(model: torch.nn.Module, job: Job, path: str, blocks: int) -> tuple[int, float]:
    """Return (number of experts of a mixture, the greatest common divisor if mixtures differ; number of the
    mixtures' trained elements over ``blocks``, the number of blocks). Return (0, 0.0) if the model has no
    mixtures or some outside the blocks at ``path``."""
    try:
        names = find_mixtures(model, job.experts)
        counts = [count_experts(model.get_submodule(name), name) for name in names]
    except UserError:
        return 0, 0.0
    if not all(name.startswith(child_prefix(path)) for name in names):
        return 0, 0.0
    params = (p for name in names for p in model.get_submodule(name).parameters() if p.requires_grad)
    return math.gcd(*counts), sum(p.numel() for p in params) / blocks


def _trace_order(key: Key) -> int:
    """Return the place of the trace ``key`` in the order in which traces are made: -1 (first) if it uses
    torch.compile, 1 (last) if it is of several ranks and therefore uses distributed tensors, else 0.

    The order keeps apart the traces that load parts of torch which the others do not need.
    """
    if any(u.technique == "compile" for u in key.uses):
        return -1
    return int(key.tensor > 1 or key.context > 1 or key.experts > 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _FirstSamples:
    """A `make_batch` that always returns the first ``samples`` samples of the batch ``whole``. Tensors whose
    first dimension is ``batch_size``, that of ``whole``, are cut; all else is returned as it is."""

    whole: Any
    batch_size: int
    samples: int

    def __call__(self, step: int, seed: int) -> Any:
        def first(value: Any) -> Any:
            has_samples = hasattr(value, "dim") and value.dim() > 0 and value.shape[0] == self.batch_size
            return value[: self.samples].clone() if has_samples else value

        return _pytree.tree_map(first, self.whole)
