"""Record the allocation and release of every storage and every operator call, in order.

Storages are counted, so a tensor and its views count once. Sizes are rounded up to the device's allocation
granularity: 64 B on CPU and 512 B on CUDA (types/device_kind.py).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from memfit.model.batch_objects import batch_tensors
from memfit.model.tensors import plain_tensors
from memfit.trace import operators
from memfit.trace.assumed_values import is_assumed
from memfit.trace.concrete_values import ConcreteValues
from memfit.trace.data_dependent import Guesses
from memfit.trace.fake_storage import correct_norm_outputs, sole_counts, strided_storage
from memfit.trace.operators import tensors_in
from memfit.trace.optimizer_scalars import COUNTING, count_from_late_step
from memfit.trace.source_location import ModuleStack, library_line, newest_node, running_node, user_place
from memfit.trace.streams import StreamTracker, StreamUse
from memfit.types.device_kind import device_kind
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan, peak_of_lives, rounded

_PRODUCT = ("aten.bmm.default", "aten.mm.default")  # makes attention scores; computes a linear layer


@dataclasses.dataclass(slots=True)
class Life:
    """The record of one storage, or of ``pieces`` equal ones: the size of each before rounding, the clocks at
    which they are allocated (``start``) and released (``end``; None while they are alive), and what made
    them. A clock counts recorded events. ``category`` None: `AllocationRecorder.finish` decides it."""

    start: int
    size_bytes: int
    phase: Phase
    step: int
    module: str
    op: str
    line: str
    node: int  # sequence number of the running autograd node, also in forward if gradients are computed there
    end: int | None = None
    category: Category | None = None
    memory_pool: str = ""
    pieces: int = 1  # as of `Allocation`; ``size_bytes`` is the size of one piece


_ROWS = "_memfit_rows"


class _Rows:
    """The rows of a sparse COO tensor, shared by all its views. ``size_bytes``: of their indices and values.
    ``distinct_ratio``: the number of distinct indices divided by that of rows (1.0 if not known).
    ``joined``: whether the tensor is coalesced, so that rows of equal index have been added up."""

    def __init__(self, size_bytes: int, distinct_ratio: float) -> None:
        self.size_bytes, self.distinct_ratio, self.joined = size_bytes, distinct_ratio, False


def _rows_of(tensor: torch.Tensor) -> _Rows:
    rows: _Rows | None = getattr(tensor, _ROWS, None)
    if rows is None:
        setattr(tensor, _ROWS, rows := _Rows(0, 1.0))
    return rows


_SPARSE_COPIES = 5  # copies of a gradient's rows that SparseAdam holds at the same time
# Stands for an optimizer's unknown scalar (step count, product of momenta): formulas divide by x and by 1 - x
_SCALAR = 0.5
_UPDATING = frozenset({Phase.BACKWARD, Phase.OPTIMIZER})  # phases in which an optimizer steps
_DEVICE: Any = torch.ops.prim.device.default
_NOTHING = operators.OperatorWork("[]", "", 0, 0)


class AllocationRecorder(TorchDispatchMode):
    """Dispatch mode that records storages and operator calls. Enter it inside a FakeTensorMode.

    ``phase()`` starts a phase of the training step. ``label()`` assigns a category to storages. ``finish()``
    returns the record: (allocations, operator calls, phase spans). ``device``, a kind such as "cuda", decides
    how sizes are rounded and what some kernels allocate. With ``lines``, each allocation records the line of
    the user's code that made it. ``guesses`` gives the answers where the step reads values of fake tensors
    (None: a new `Guesses` without bounds). The attribute ``follows_optimizer_scalars``, False at first:
    whether the optimizer's own counts and factors of one element are computed, from a late step on
    (`count_from_late_step`), because its update may branch on them.
    """

    def __init__(self, device: str, *, lines: bool = False, guesses: Guesses | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.kind = device, device_kind(device)
        self.lines = lines
        self.clock = 0
        self.step = 0
        self.current = Phase.SETUP
        self.lives: list[Life] = []
        self.spans: list[PhaseSpan] = []
        self.modules = ModuleStack()
        self.concrete_values = ConcreteValues()
        self.guesses = guesses or Guesses()
        self.guesses.concrete_values = self.concrete_values
        self.optimizer_scalars = ConcreteValues()
        self.optimizer_scalars.max_elements = 1
        self.follows_optimizer_scalars = False
        self.results = operators.Results(self.guesses, device)
        self.offloaded_bytes = self.restored_bytes = self.offloaded_tensors = 0
        self.storage_written_bytes = self.storage_read_bytes = self.storage_bytes = 0
        self.paused = False
        # The memory pool of new tensors: "" (the model's device), "host", "nowhere" (not counted), or the
        # name of another stream's pool.
        self.memory_pool = ""
        # Whether what optimizers and loops compute from tensors in host memory alone lies there too.
        self.follows_host = False
        # Dispatch modes entered after this one; each holds a reference to the arguments during a call.
        self.modes_above = 0
        self._span_start = 0
        self._known: dict[int, tuple[weakref.ref[Any], Life]] = {}
        self._calls: list[operators.OperatorCall] = []
        self.stream_tracker = StreamTracker()
        self._sole = sole_counts()
        self.sparse_seen = False  # whether an operator has made a sparse tensor
        self._line_of_node: dict[int, str] = {}
        # Storage of a collective's result -> tensor it sends, kept until the result is waited for.
        self._flying: dict[int, Any] = {}
        # Operator last called on a wrapper subclass, such as a tensor that is not yet waited for.
        self._outer: Any = None

    # -- called by the training step ----------------------------------------------------------------

    def phase(self, phase: Phase) -> None:
        """End the present phase and start ``phase`` in the present step. From the first batch on, real values
        are followed in all phases but the optimizer's; in that one, only those of one element, and only with
        ``follows_optimizer_scalars``."""
        self._close_span()
        self.current = phase
        self.concrete_values.on = self.concrete_values.seeded and phase is not Phase.OPTIMIZER
        self.optimizer_scalars.on = self.follows_optimizer_scalars and phase is Phase.OPTIMIZER

    def next_step(self) -> None:
        """Let what is recorded from now on belong to the next step, and also the phase that is running."""
        self.step += 1

    def label(self, value: Any, category: Category, *, module: str | None = None) -> None:
        """Assign ``category`` and, unless it is None, ``module`` to the storages of every tensor in
        ``value``, in place of what they had before. ``value``: a tensor, or a batch or other container of
        tensors. Storages that have not been recorded yet are recorded as made now. Raises what `note_real`
        raises."""
        with torch._C.DisableTorchFunction():  # as in `__torch_dispatch__`
            for tensor in [value] if isinstance(value, torch.Tensor) else batch_tensors(value):
                for inner in plain_tensors(tensor):
                    life = self.note_real(inner, category.value)
                    life.category = category
                    life.module = life.module if module is None else module

    def note_real(self, tensor: torch.Tensor, op: str) -> Life:
        """Return the record of a tensor's storage. If the storage is not recorded yet, because this mode did
        not see it being made, record it as if the operator ``op`` made it now. Raises UserError for a tensor
        that is neither dense nor sparse COO."""
        return self._note(tensor, op, self.modules.name(self.current))

    def note_offload(self, out_bytes: int, back_bytes: int) -> None:
        """Count one more offloaded tensor: ``out_bytes`` are copied to the host, ``back_bytes`` back."""
        self.offloaded_bytes += out_bytes
        self.restored_bytes += back_bytes
        self.offloaded_tensors += 1

    def note_storage(self, written_bytes: int, read_bytes: int, size_bytes: int) -> None:
        """Add to the bytes written to local storage and read from it. ``size_bytes``: what the storage then
        holds; the largest of all calls is kept."""
        self.storage_written_bytes += written_bytes
        self.storage_read_bytes += read_bytes
        self.storage_bytes = max(self.storage_bytes, size_bytes)

    def start_counts(self) -> None:
        """Set to 0 the counts of `note_offload`, and the bytes written and read of `note_storage`."""
        self.offloaded = (0, 0, 0)
        self.storage_written_bytes = self.storage_read_bytes = 0

    @property
    def offloaded(self) -> tuple[int, ...]:
        """(Bytes copied to the host, bytes copied back, number of tensors) that `note_offload` has counted
        since `start_counts`."""
        return self.offloaded_bytes, self.restored_bytes, self.offloaded_tensors

    @offloaded.setter
    def offloaded(self, counts: tuple[int, ...]) -> None:
        self.offloaded_bytes, self.restored_bytes, self.offloaded_tensors = counts

    @property
    def call_count(self) -> int:
        """The number of operator calls recorded so far."""
        return len(self._calls)

    def counts(self) -> Counter[str]:
        """Return how often so far a value was asked for ("questions"), how often values were drawn or assumed
        ("draws"), and the number of operator calls of each stream ("stream NAME")."""
        streams = {f"stream {name}": calls for name, calls in self.stream_tracker.calls.items()}
        return Counter(questions=self.guesses.questions, draws=self.concrete_values.draws, **streams)

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Add ``counts``, a difference of two results of `counts`, for operators that were not run."""
        for name, count in counts.items():
            if name == "questions":
                self.guesses.questions += count
            elif name == "draws":
                self.concrete_values.draws += count
            else:
                self.stream_tracker.calls[name.removeprefix("stream ")] += count

    def surroundings(self) -> tuple[Any, ...]:
        """Return what decides, besides an operator's arguments, how its call is recorded now: (phase, memory
        pool, module, line of the user's code or "" if lines are not recorded, whether gradients are enabled).
        """
        line = self._line() if self.lines else ""
        module = self.modules.name(self.current)
        return self.current, self.memory_pool, module, line, torch.is_grad_enabled()

    def calls_between(self, first: int, last: int | None = None) -> list[operators.OperatorCall]:
        """Return the recorded calls from index ``first`` to before ``last`` (None: to the newest)."""
        return self._calls[first:last]

    def repeat_calls(
        self, calls: Iterable[operators.OperatorCall], shift: int, modules: Mapping[str, str]
    ) -> None:
        """Record the calls again in the present step, at clocks that are ``shift`` higher than their own. The
        recorder's clock stays. ``modules``: module path -> path to record in its place; other paths stay."""
        self._calls += [
            dataclasses.replace(
                call,
                clock=call.clock + shift,
                step=self.step,
                module=modules.get(call.module, call.module),
            )
            for call in calls
        ]

    def multiply_calls(self, indices: range, times: int) -> None:
        """Multiply by ``times`` the number of calls for which each recorded call at ``indices`` stands."""
        self._calls[indices.start : indices.stop] = [
            dataclasses.replace(call, times=times * call.times)
            for call in self._calls[indices.start : indices.stop]
        ]

    def repeat_life(self, life: Life, count: int) -> Life:
        """Record ``count`` more copies of the storage (or storages) of ``life``, as made now in the present
        step, and return their common record. It has no end until `adopt` gives it a tensor's storage, with
        which it ends."""
        repeated = dataclasses.replace(
            life, start=self.clock, end=None, step=self.step, pieces=count * life.pieces
        )
        self.clock += 1
        self.lives.append(repeated)
        return repeated

    def life_of(self, tensor: torch.Tensor) -> Life | None:
        """Return the record of a plain tensor's storage, or None if it is not recorded."""
        entry = self._known.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry is not None and entry[0]() is not None else None

    def adopt(self, tensor: torch.Tensor, life: Life) -> None:
        """Make ``life`` the record of the tensor's storage, which must not be recorded yet. It ends when the
        storage is freed."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (weakref.ref(storage, self._death(storage._cdata)), life)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record that a storage was resized in place: a block of the new size begins and then the old block
        ends. Do nothing if the storage is not recorded or has kept its size."""
        entry = self._known.get(storage._cdata)
        size_bytes = storage.nbytes()
        if entry is None or entry[0]() is None or entry[1].size_bytes == size_bytes:
            return
        reference, old_life = entry
        # Torch allocates the new block, copies the contents and then frees the old block.
        new_life = self._born(size_bytes, old_life.op, old_life.module, old_life.category)
        self.end(old_life)
        self._known[storage._cdata] = (reference, new_life)

    def restart(self) -> int:
        """Forget all operator calls, phase spans and ended storages. Start the clock and the step again at 0,
        as if the storages that are alive were then made in set-up, one after the other. Return the peak so
        far of live bytes on the model's device, not rounded."""
        on_device = [x for x in self.lives if not x.memory_pool]
        peak_bytes = peak_of_lives((x.start, x.end, x.size_bytes) for x in on_device)
        self.lives = [life for life in self.lives if life.end is None]
        for clock, life in enumerate(self.lives):
            life.start, life.phase, life.step = clock, Phase.SETUP, 0
        self.clock, self._span_start, self.step = len(self.lives), 0, 0
        self.spans.clear()
        self._calls.clear()
        return peak_bytes

    # -- called by torch ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device  # autograd asks very often, and every fake tensor knows its device
        with torch._C.DisableTorchFunction():  # function modes concern the step, not what is recorded of it
            return self._dispatch(func, types, args, kwargs or {})

    def _dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        for kind in types:
            if kind is not FakeTensor and is_traceable_wrapper_subclass_type(kind):
                self._outer = func
                return NotImplemented  # its inner operators arrive here one by one
        if self.paused:
            return self._unrecorded(func, args, kwargs)
        if (
            FakeTensor not in types
            and func is not operators.LIFT
            and any(isinstance(a, torch.Tensor) for a in args)
        ):
            with no_dispatch():
                # Real tensors, such as those of a device mesh, have values that can be read.
                return func(*args, **kwargs)
        if func is operators.COMING:
            return AsyncCollectiveTensor(args[0])
        fact = operators.fact(func)
        if (decompose := operators.decomposition(func, fact, args)) is not None:
            with self:
                return decompose(*args, **kwargs)
        followed = self.optimizer_scalars if self.optimizer_scalars.on else self.concrete_values
        values = followed.values(func, args, kwargs)
        if self.follows_optimizer_scalars and func in COUNTING and self.current in _UPDATING:
            count_from_late_step(followed, args)
        if func is operators.ITEM:
            return self._item(args[0], values)
        is_updating = self.current in (Phase.SETUP, Phase.OPTIMIZER)
        is_hosted = self.follows_host and is_updating and self._all_on_host((args, kwargs))
        with self.in_memory_pool("host") if is_hosted else contextlib.nullcontext():
            out = (
                self._silent(func, fact, args, kwargs)
                if fact.silent
                else self._run_recorded(func, fact, args, kwargs, values)
            )
        if values is not None and (func not in operators.MAKERS or self.concrete_values.follows_all):
            followed.attach(out, values)
        return out

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor, or each tensor in a wrapper such as DTensor, lies in the pool "host".
        False if its storage is not recorded."""
        lives = [self.life_of(inner) for inner in plain_tensors(tensor)]
        return all(life is not None and life.memory_pool == "host" for life in lives)

    def _all_on_host(self, arguments: Any) -> bool:
        """Return whether there are tensors with dimensions among the arguments, all of them in the pool
        "host"."""
        tensors = [t for t in tensors_in(arguments) if t.dim()]
        return bool(tensors) and all(map(self.is_on_host, tensors))

    def _item(self, tensor: Any, value: Any) -> bool | int | float:
        """Return the answer to ``tensor.item()`` (`Guesses.item`). ``value``: the known or assumed value, or
        None; an unknown floating-point number in the optimizer's phase is answered with 0.5.

        Answers in the phases setup and optimizer are not listed as assumptions, nor are known ones in
        backward that no line of the user or of a library asks for, because an optimizer that steps in
        backward does.
        """
        is_listed = self.current not in (Phase.OPTIMIZER, Phase.SETUP)
        if self.current is Phase.OPTIMIZER and value is None and tensor.dtype.is_floating_point:
            value = _SCALAR
        if self.current is Phase.BACKWARD and value is not None and not library_line():
            is_listed = is_assumed(self.concrete_values.of(tensor))
        return self.guesses.item(tensor, is_listed=is_listed, value=value)

    def _unrecorded(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is operators.ITEM and args[0].constant is None:
            return self.guesses.item(args[0], is_listed=False)
        if self.guesses.decides(func):
            return self.guesses.call(func, args, kwargs)
        return self.results.built(func, args, kwargs)

    def _silent(self, func: Any, fact: operators.OperatorFact, args: Any, kwargs: Any) -> Any:
        if func in operators.MAKERS:
            out = self.results.of(operators.call_key(func, args, kwargs), func, args, kwargs)
        elif (
            out := self.results.lifted(args[0])
            if func is operators.LIFT
            else operators.view(func, args, kwargs)
        ) is None:
            out = func(*args, **kwargs)
        if func in operators.MAKERS:
            self._note(out, fact.name, self.modules.name(self.current))
        elif self.sparse_seen and operators.is_sparse(out) and operators.is_sparse(args[0]):
            setattr(out, _ROWS, _rows_of(args[0]))
        return out

    def _run_recorded(
        self, func: Any, fact: operators.OperatorFact, args: Any, kwargs: Any, values: Any
    ) -> Any:
        """Run an operator that does work (all but `OperatorFact.silent` ones), in place if torch would do so
        on plain tensors (`_writes`), and return its result. ``values`` is its result on real values, or None
        if they are not known. An operator that takes or makes sparse tensors is left to `_sparse`.

        Record the storages of its outputs and temporary tensors, and the call with its cost. While the model
        is built on the host, the call is not recorded. Raises what `Results.of`, `Results.work` and
        `note_real` raise.
        """
        if func in operators.SPARSE_MAKERS or (self.sparse_seen and any(map(operators.is_sparse, args))):
            return self._sparse(func, fact, args, kwargs)
        module = self.modules.name(self.current)
        owners = self._owners(args) if not module and self.current in (Phase.SETUP, Phase.OPTIMIZER) else []
        module = module or (owners[0] if len(owners) == 1 else "")
        start_clock = self.clock
        self.clock += 1
        key = operators.call_key(func, args, kwargs)
        if self._writes(func, args, kwargs):
            self.guesses.positions(func, args)
            func, out = operators.IN_PLACE[func], args[0]
            fact, key = operators.fact(func), (func, *key[1:])
        else:
            out = self.results.of(key, func, args, kwargs, values)
            if func in operators.WIDE_LOSSES:
                self._widen(args[0], args[1], out)
            elif func in operators.SLIDING_WINDOWS:
                self._keep_first_block(args[0], out)
            elif func is operators.SOFTMAX_BACKWARD and self.kind.kernels == "cuda":
                # The product with the gradient: SoftMax.cu.
                self.guesses.scratch.append(torch.empty_like(args[1]))
            elif func in operators.NORMS:
                out = correct_norm_outputs(func, args, out, self.device)
        outputs = tensors_in(out)
        per_output = len(owners) == len(outputs) > 1
        for i, tensor in enumerate((*self.guesses.scratch, *outputs)):
            self._note(tensor, fact.name, owners[i] if per_output else module)
            if fact.resizes:
                self.resized(tensor.untyped_storage())
        self.guesses.scratch.clear()
        self._fly(func, args, out)
        work = self.results.work(key, func, fact, args, kwargs, out)
        # Building the model on the host is not device work.
        if self.memory_pool != "host" or self.current is not Phase.SETUP:
            self._record(
                start_clock,
                fact.name,
                work,
                module,
                self.stream_tracker.note_call(func, fact.name, args, out, self.memory_pool),
            )
        return out

    def _sparse(self, func: Any, fact: operators.OperatorFact, args: Any, kwargs: Any) -> Any:
        """Run an operator that takes or makes sparse tensors, and return its result (for ``is_coalesced``,
        whether rows of equal index have been added up). Record the bytes of the rows of each sparse result,
        but not the call.

        Fake sparse tensors hold no rows, so `_Rows` holds their size. A call that makes one from dense
        tensors gives it the size of these. The results of other calls have the size of their largest sparse
        argument, and sums that of all; coalescing multiplies it by the fraction of distinct rows. If an
        optimizer coalesces rows, the copies of them that it works on (torch/optim/_functional.py) are
        recorded as well.
        """
        if func is operators.IS_COALESCED:  # rows may repeat, and coalescing them is work
            return _rows_of(args[0]).joined
        # A fake sparse tensor without rows counts as coalesced, and torch would not coalesce it again.
        out = args[0].clone() if func is operators.COALESCE else func(*args, **kwargs)
        input_rows = [_rows_of(t) for t in args if operators.is_sparse(t)]
        size_bytes = max((rows.size_bytes for rows in input_rows), default=0)
        distinct_ratio = min((rows.distinct_ratio for rows in input_rows), default=1.0)
        if func is operators.ADD and len(input_rows) > 1:  # torch concatenates the rows
            size_bytes = sum(rows.size_bytes for rows in input_rows)
        if func is operators.COALESCE:
            size_bytes, distinct_ratio = int(size_bytes * distinct_ratio), 1.0
        if func in operators.SPARSE_MAKERS:
            dense_tensors = [t for t in tensors_in(args) if not operators.is_sparse(t)]
            size_bytes = sum(t.numel() * t.element_size() for t in dense_tensors) or size_bytes
            indices = next(
                (self.concrete_values.of(t) for t in dense_tensors if t.dtype is torch.int64), None
            )
            if indices is not None and indices.numel():
                with no_dispatch():
                    distinct_ratio = indices.unique(dim=-1).numel() / indices.numel()
        self.sparse_seen = True
        output_rows = [_Rows(size_bytes, distinct_ratio) for t in tensors_in(out) if operators.is_sparse(t)]
        for tensor, rows in zip(filter(operators.is_sparse, tensors_in(out)), output_rows, strict=True):
            setattr(tensor, _ROWS, rows)
            self._note(tensor, fact.name, self.modules.name(self.current))
            rows.joined = func is operators.COALESCE
        if func is operators.COALESCE and self.current is Phase.OPTIMIZER:
            for copy in [_Rows(size_bytes, 1.0) for _ in range(_SPARSE_COPIES)]:
                output_rows.append(copy)
                self._note_rows(copy, fact.name, self.modules.name(self.current))
        return out

    def _note_rows(self, rows: _Rows, op: str, module: str) -> Life:
        entry = self._known.get(id(rows))
        if entry is not None and entry[0]() is rows:
            return entry[1]
        life = self._born(rows.size_bytes, op, module)
        self._known[id(rows)] = (weakref.ref(rows, self._death(id(rows))), life)
        return life

    def _owners(self, args: Any) -> list[str]:
        """Return the module path (`owner`) of the first argument or, if that is a list or tuple, of each
        tensor in it. Return [] if there is no tensor. Used while the model is built and in the optimizer,
        where a result gets the module of the parameter that the operator works on."""
        argument = args[0] if args else None
        tensors = argument if isinstance(argument, list | tuple) else [argument]
        return [self.owner(t) for t in tensors if isinstance(t, torch.Tensor)]

    def owner(self, tensor: torch.Tensor) -> str:
        """Return the path of the module that the tensor's storage is recorded for. A wrapper subclass such as
        DTensor counts as its first dense inner tensor. Return "" for a sparse tensor, and if the storage is
        not recorded or has no module."""
        dense = [t for t in plain_tensors(tensor) if not t.is_sparse]
        entries = [self._known.get(t.untyped_storage()._cdata) for t in dense]
        return entries[0][1].module if entries and entries[0] is not None else ""

    def unseen(self, build: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
        """Return a function that calls ``build`` without recording its operators and storages (`pause`). The
        storages of the model's tensors are recorded when they are passed to `label`."""
        return self.pause()(build)

    def pause(self) -> contextlib._GeneratorContextManager[None]:
        """Inside this context, record no operators, no waits, and no storages that operators make. `label`
        and `note_real` still record storages."""
        return self._set("paused", True)

    def in_memory_pool(self, pool: str) -> contextlib._GeneratorContextManager[None]:
        """Inside this context, record new storages as lying in ``pool``: "" (the model's device), "host"
        (host memory), "nowhere" (not counted), or the name of a stream, whose memory pool they come from.
        Operators are recorded as running there."""
        return self._set("memory_pool", pool)

    @contextlib.contextmanager
    def _set(self, name: str, value: Any) -> Iterator[None]:
        previous = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, previous)

    def wait(self, stream: str, awaited: str, calls: int) -> None:
        """Record that ``stream`` waits until the first ``calls`` operator calls of the stream ``awaited``,
        counted from the start of the trace, have ended. Do nothing if both are the same stream or while
        recording is paused."""
        stream_use = self.stream_tracker.wait(stream, awaited, calls)
        if stream_use is not None and not self.paused:
            self._record(self.clock, "stream.wait", _NOTHING, self.modules.name(self.current), stream_use)
            self.clock += 1

    def _record(
        self, clock: int, name: str, work: operators.OperatorWork, module: str, stream_use: StreamUse | None
    ) -> None:
        self._calls.append(
            operators.OperatorCall(clock, name, work, self.current, self.step, module, stream_use)
        )

    def move(self, value: Any, pool: str) -> None:
        """Record that the storages of every tensor in ``value`` have been in ``pool`` (see `in_memory_pool`)
        since they were made. Storages that have not been recorded yet are recorded as made now. Raises what
        `note_real` raises."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors_in(value):
                for inner in plain_tensors(tensor):
                    self.note_real(inner, "").memory_pool = pool

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs more than the bookkeeping

    def _widen(self, prediction: torch.Tensor, target: torch.Tensor, loss: torch.Tensor) -> None:
        """If ``loss`` is a scalar that is reduced from several elements, enlarge its storage to the size of
        the unreduced loss, and add a temporary tensor of that size to `Guesses.scratch`. Torch keeps such a
        loss in the storage of the unreduced one, which it computes from another tensor of that size
        (aten/src/ATen/native/Loss.cpp)."""
        elements = math.prod(torch.broadcast_shapes(prediction.shape, target.shape))
        if loss.dim() == 0 and elements > 1:
            loss.untyped_storage().resize_(elements * loss.element_size())
            self.guesses.scratch.append(loss.new_empty(elements))

    def _keep_first_block(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Record for ``out``, the result of ``F.unfold`` or ``F.fold`` on ``x``, what torch allocates. The
        kernels resize an empty tensor like ``x`` (aten/src/ATen/native: Im2Col.cpp, Col2Im.cpp, also under
        cuda). A result with fewer elements stays in this larger storage, so the storage of ``out`` is
        enlarged. For any other, the first block lives until the second is allocated: a temporary tensor like
        ``x`` is added to `Guesses.scratch`."""
        if out.numel() < x.numel():
            out.untyped_storage().resize_(x.numel() * x.element_size())
        else:
            self.guesses.scratch.append(torch.empty_like(x, memory_format=torch.contiguous_format))

    def _fly(self, func: Any, args: Any, out: Any) -> None:
        """If ``func`` is a functional all-gather, reduce-scatter or all-to-all, keep its input alive until
        its result ``out`` is waited for. If ``func`` is that wait, release the input. Do nothing for other
        operators."""
        if func in operators.SENDING:
            self._flying[out.untyped_storage()._cdata] = args[0]
        elif func is operators.WAIT:
            self._flying.pop(out.untyped_storage()._cdata, None)

    def _writes(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Return whether torch would run ``func`` in place on plain tensors (`_solely_held`, `_in_place`).
        False if it was called on a wrapper subclass such as DTensor, whatever tensors that contains."""
        is_plain = self._outer is not func
        self._outer = self._outer if is_plain else None
        return (
            func in operators.IN_PLACE
            and is_plain
            and self._solely_held(args[0], spare=int(func is not operators.ADD))
            and self._in_place(func, *args, **kwargs)
        )

    def _solely_held(self, tensor: Any, spare: int) -> bool:
        """Return whether only one reference holds this tensor, only this tensor holds its storage, and it
        fills the storage. The one reference is torch's own, in C++. Up to ``spare`` more references to the
        tensor are allowed, for a derivative formula that has just checked whether the tensor is a
        subclass."""
        storage = tensor.untyped_storage()
        references = tensor._use_count() - self.modes_above - self._sole[0]
        is_sole = 0 <= references <= spare and torch._C._storage_Use_Count(storage._cdata) == self._sole[1]
        return is_sole and tensor.numel() * tensor.element_size() == storage.nbytes()

    def _in_place(self, func: Any, target: Any, operand: Any, *args: Any, **kwargs: Any) -> bool:
        """Return whether torch, on plain tensors, runs this operator in place on its first argument
        ``target``, which nothing else holds (`_solely_held`). ``operand`` is its second argument. On fake
        tensors torch never does so. The cases are:

        - adding the bias of a linear layer (aten/src/ATen/native/Linear.cpp), or the mask to attention scores
          (transformers/attention.cpp there);
        - in a derivative formula, writing into zeros that it has just made, or into the probabilities of
          logits (areAnyTensorSubclassLike in torch/csrc/autograd/FunctionsManual.cpp);
        - accumulating a gradient that only the autograd engine holds (input_buffer.cpp there). The first term
          was made by an earlier node, or by this node if it has two edges to the same input. Sums inside a
          formula start from a tensor that the formula made and are not in place.
        """
        entry = self._known.get(target.untyped_storage()._cdata)
        if entry is None or (func is operators.ADD and (kwargs or not isinstance(operand, torch.Tensor))):
            return False
        if func is operators.ADD and target.dim() > 2 and entry[1].op == _PRODUCT[operand.dim() == 1]:
            return bool(torch.broadcast_shapes(target.shape, operand.shape) == target.shape)
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return False
        this_node = entry[1].node == running_node()
        if func in operators.OF_LOGITS:
            is_formula = this_node and not torch.is_grad_enabled() and "sigmoid" in entry[1].op
            return is_formula and "CrossEntropyWithLogits" in node.name()
        if func is not operators.ADD:
            # The backward of scatter_reduce.
            is_scatter_reduce = func is operators.SCATTER_ADD and "zeros_like" in entry[1].op
            return this_node and "zeros" in entry[1].op and not is_scatter_reduce
        if self.current is not Phase.BACKWARD or torch.is_grad_enabled():
            return False
        return not this_node or len(set(node.next_functions)) < len(node.next_functions)

    def _note(self, tensor: torch.Tensor, op: str, module: str) -> Life:
        if operators.is_sparse(tensor):
            return self._note_rows(_rows_of(tensor), op, module)
        storage = strided_storage(tensor)
        key = storage._cdata
        entry = self._known.get(key)
        if entry is not None and entry[0]() is not None:
            return entry[1]
        life = self._born(storage.nbytes(), op, module)
        self._known[key] = (weakref.ref(storage, self._death(key)), life)
        return life

    def _line(self) -> str:
        """Return the line of the user's code that runs, such as "/home/me/model.py:12" (`user_place`). If
        none runs in backward, return the line that made the running autograd node in forward. Return "" if
        there is none."""
        line = user_place()
        if self.current is Phase.FORWARD:
            self._line_of_node.setdefault(newest_node(), line)
        elif not line and self.current is Phase.BACKWARD:
            line = self._line_of_node.get(running_node(), "")
        return line

    def _born(self, size_bytes: int, op: str, module: str, category: Category | None = None) -> Life:
        line = self._line() if self.lines else ""
        node = running_node() if self.current in (Phase.FORWARD, Phase.BACKWARD) else 0
        life = Life(
            self.clock,
            size_bytes,
            self.current,
            self.step,
            module,
            op,
            line,
            node,
            category=category,
            memory_pool=self.memory_pool,
        )
        self.clock += 1
        self.lives.append(life)
        return life

    def end(self, life: Life) -> None:
        """Record that the storage (or storages) of ``life`` is freed now."""
        life.end = self.clock
        self.clock += 1

    def _death(self, key: int) -> Callable[[Any], None]:
        def died(reference: Any) -> None:
            entry = self._known.get(key)
            if entry is not None and entry[0] is reference:
                self.end(entry[1])
                del self._known[key]

        return died

    # -- results ------------------------------------------------------------------------------------

    def _close_span(self) -> None:
        if self.clock > self._span_start:
            span = PhaseSpan(phase=self.current, step=self.step, start=self._span_start, end=self.clock)
            self.spans.append(span)
        self._span_start = self.clock

    def finish(self) -> tuple[tuple[Allocation, ...], tuple[OpCall, ...], tuple[PhaseSpan, ...]]:
        """End the present phase and return (allocations, operator calls, phase spans) of the whole record. An
        allocation without a category is an activation if it is made in forward and outlives that phase, else
        temporary."""
        self._close_span()
        bounds = sorted({s.end for s in self.spans})
        ops = tuple(call.finish() for call in self._calls)
        return tuple(self._allocation(x, bounds) for x in self.lives), ops, tuple(self.spans)

    def _allocation(self, life: Life, bounds: list[int]) -> Allocation:
        category = life.category
        if category is None:
            index = bisect.bisect_right(bounds, life.start)
            phase_end = bounds[index] if index < len(bounds) else self.clock
            outlives = life.end is None or life.end >= phase_end
            is_saved = life.phase is Phase.FORWARD and outlives
            category = Category.ACTIVATION if is_saved else Category.TEMPORARY
        return Allocation(
            start=life.start,
            end=life.end,
            size_bytes=life.pieces * rounded(life.size_bytes, self.device),
            category=category,
            phase=life.phase,
            step=life.step,
            module=life.module,
            op=life.op,
            line=life.line.rpartition("/")[2],
            file=life.line.rpartition(":")[0],
            requested_bytes=life.pieces * life.size_bytes,
            stream=life.memory_pool,
            pieces=life.pieces,
        )
