"""Find modules that work on independent slices of their inputs, and the memory they use inside, for
chunking."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from memfit.model.blocks import child_prefix, equal_blocks, find_blocks
from memfit.model.chunking_probe import LiveBytes, ModuleCall, columns_bytes, find_cut
from memfit.model.linear_roles import PlaceholderValues, without_values
from memfit.model.tensors import tensor_leaves
from memfit.types.errors import UserError

_MOST_PARAMETERS = 2**25  # of a module that is run on random numbers
_MOST_TENSORS = 6
# If a module's submodules hold more than this share of its inner bytes, they are cut instead of it.
_HELD_BELOW = 0.75
# First calls by everything that decides them, because a search asks for them for many plans.
_SEEN: dict[object, tuple[object, dict[str, ModuleCall]]] = {}
_MOST_SEEN = 4
_OF_VALUES = (DynamicOutputShapeException, DataDependentOutputException)
_WORTH = 4  # the search considers cutting a module if it makes this many times its output inside


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkCut:
    """How to cut a module's inputs. A leaf is an element of the flattened (args, kwargs), given by its index.

    ``axes``: leaf that is cut -> axis along which that tensor is cut. ``first``: the leaf in ``axes`` whose
    size decides how many slices there are. ``out_axis``: the axis along which the outputs of slices are
    joined. ``inside_bytes``: what the module allocates inside if the leaf ``first`` has ``first_count``
    elements. ``form``: how arguments were passed in the call that was tried, the values of those that are no
    tensors, and the kinds and dimensions of tensors."""

    axes: Mapping[int, int]
    first: int
    out_axis: int
    inside_bytes: int
    first_count: int
    form: tuple[object, ...]

    def length(self, leaves: list[Any], spec: Any) -> int:
        """Return the length of the cut axes in a call with these flattened (args, kwargs). Return 0 if it
        cannot be cut: its tensors have different lengths there, or it has another ``form`` than the call that
        was tried, so that its slices may depend on each other, or its tensors may have other axes."""
        if _form(leaves, spec) != self.form:
            return 0
        lengths = {leaves[leaf].shape[axis] for leaf, axis in self.axes.items()}
        return int(lengths.pop()) if len(lengths) == 1 else 0


def _form(leaves: list[Any], spec: Any) -> tuple[object, ...]:
    """Return what two calls must have in common, so that what is true of slices of one is true of the other:
    how arguments are passed; the values of arguments that are no tensors; and of each tensor whether it is
    floating-point, the number of its dimensions, and which of these have length 1, as broadcast ones do."""
    return (
        repr(spec),
        *(
            (leaf.is_floating_point(), *(n == 1 for n in leaf.shape))
            if isinstance(leaf, torch.Tensor)
            else _state_text(leaf)
            for leaf in leaves
        ),
    )


class _Watch(PlaceholderValues):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, ModuleCall] = {}
        self._stack: list[ModuleCall] = []

    def watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(self._entering, with_kwargs=True)
                module.register_forward_hook(self._leaving(name))

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(ModuleCall(*_pytree.tree_flatten((args, kwargs))))

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            call = self._stack.pop()
            if self._stack:
                self._stack[-1].inside_bytes += call.inside_bytes
                self._stack[-1].columns_bytes += call.columns_bytes
                self._stack[-1].reach = max(self._stack[-1].reach, call.reach)
                self._stack[-1].random |= call.random
            if isinstance(out, torch.Tensor):
                call.out_shape = tuple(out.shape)
                call.out_bytes = out.nbytes
                call.inside_bytes -= out.nbytes
            self.calls.setdefault(name, call)

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._stack:
            call = self._stack[-1]
            input_storages = {
                _storage(t) for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
            }
            outputs = tensor_leaves(out)
            call.inside_bytes += sum(t.nbytes for t in outputs if _storage(t) not in input_storages)
            if func is torch.ops.aten.convolution.default:
                call.columns_bytes += columns_bytes(out, args[1])
            call.reach = max(call.reach, _reach(func, args))
            call.random |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return out


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _reach(func: Any, args: Any) -> int:
    """Return how far apart the elements are that an operator combines: the largest dilation of a convolution,
    the largest width that a padding adds or removes, or 0 for another operator. A trial with an input no
    longer than this does not show that the operator combines elements."""
    if func is torch.ops.aten.convolution.default:
        return int(max(args[5]))
    is_padding = "_pad" in func.__name__ and isinstance(args[1], list)
    return int(max(map(abs, args[1]), default=0)) if is_padding else 0


@dataclasses.dataclass(slots=True)
class ChunkTrials:
    """Runs trials of modules (`find_cut`), each of which has a key of everything that decides its result, and
    keeps the results. A trial is run again only when its result is gone. ``known``: key -> (result, peak
    bytes of the trial), for keys that are only valid while their model exists. All objects of this class in
    the process share the results of the other keys; before there are more than 4,096, all are dropped.
    ``peak_bytes``: the highest peak among the trials whose results this object has returned, including those
    that it did not have to run."""

    known: dict[object, tuple[Any, int]] = dataclasses.field(default_factory=dict)
    peak_bytes: int = 0

    def result(self, key: object, run: Callable[[], Any], *, is_lasting: bool) -> Any:
        """Return the result of the trial ``key``: the one that is kept if there is one, else that of
        ``run()``, which is kept. ``is_lasting``: whether the key stays valid when its model is gone, so that
        all objects of this class share the result."""
        known = _LASTING if is_lasting else self.known
        if key not in known:
            if len(_LASTING) >= _MOST_LASTING:
                _LASTING.clear()
            with _disable_current_modes(), torch.no_grad(), LiveBytes() as live:
                result = run()
            known[key] = result, live.peak_bytes
        result, peak_bytes = known[key]
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        return result


_LASTING: dict[object, tuple[Any, int]] = {}
_MOST_LASTING = 4096


def first_calls(job: Any, model: nn.Module, parts: int = 1) -> dict[str, ModuleCall]:
    """Return module path -> the first call of that module, for all modules that are called when the job's
    loss is computed on the first of ``parts`` equal parts of its first batch. The model itself is left out. A
    copy of the model without values runs. Of blocks that are equal (`equal_blocks`), two run, and the others'
    calls are taken to be those of the second; all run if the model does not run without them. The last 4
    results are cached. Errors of the job's functions are raised."""
    try:
        path, blocks = find_blocks(model, job.blocks)
        same = {i: j for i, j in enumerate(equal_blocks(blocks)) if i != j}
        container = model.get_submodule(path)
    except UserError:
        same, container = {}, model
    if same and isinstance(container, nn.ModuleList | nn.Sequential):
        names, prefix = [*container._modules], child_prefix(path)
        left_out = {names[i]: names[j] for i, j in same.items()}
        with contextlib.suppress(Exception), _without_children(container, left_out):
            calls = dict(_first_calls(job, model, parts))
            for name, like in left_out.items():
                within = f"{prefix}{like}"
                inside = {n: call for n, call in calls.items() if f"{n}.".startswith(f"{within}.")}
                calls |= {f"{prefix}{name}{n.removeprefix(within)}": call for n, call in inside.items()}
            return calls
    return _first_calls(job, model, parts)


@contextlib.contextmanager
def _without_children(container: nn.Module, names: Container[str]) -> Iterator[None]:
    """Take the children with these names out of the container within the ``with`` block."""
    children = container._modules
    container._modules = {n: child for n, child in children.items() if n not in names}
    try:
        yield
    finally:
        container._modules = children


def _first_calls(job: Any, model: nn.Module, count: int) -> dict[str, ModuleCall]:
    # A model cut to its first blocks is built by another function each time, for the same ``origin``.
    parts = (getattr(job.build_model, "origin", job.build_model), job.make_batch, job.loss)
    tensors = tuple((n, t.dtype, tuple(t.shape)) for n, t in model.state_dict(keep_vars=True).items())
    wrapped_names = tuple(n for n, m in model.named_modules() if "forward" in vars(m) or m._forward_pre_hooks)
    key = (*map(id, parts), count, tensors, wrapped_names)
    if key not in _SEEN:
        watch = _Watch()
        with without_values(job, model, count) as (model_copy, batch):
            watch.watch(model_copy)
            with watch:
                job.loss(model_copy, batch)
        while len(_SEEN) >= _MOST_SEEN:
            del _SEEN[next(iter(_SEEN))]
        _SEEN[key] = (parts, watch.calls)  # kept alive, so that the ids stay unique
    return _SEEN[key][1]


def find_cuts(
    model: nn.Module, calls: Mapping[str, ModuleCall], budget: int, trials: ChunkTrials | None = None
) -> dict[str, ChunkCut]:
    """Return module path -> how to cut it, for modules that allocate more than ``budget`` bytes inside and
    can be cut. Slices of such a module can then run one after the other, each within the budget.

    If a module's submodules that can be cut hold more than three quarters of its inner bytes, they are cut
    and the module is left whole, as also if it cannot be cut itself. ``calls`` is the result of
    `first_calls`. ``trials`` keeps the results of trials; None: a new one."""
    trials = trials or ChunkTrials()

    def choose(name: str, module: nn.Module) -> dict[str, ChunkCut]:
        call = calls.get(name)
        if call is not None and call.inside_bytes <= budget:
            return {}
        prefix = f"{name}." if name else ""
        inner_cuts: dict[str, ChunkCut] = {}
        for child, child_module in module.named_children():
            inner_cuts |= choose(prefix + child, child_module)
        if call is None or sum(c.inside_bytes for c in inner_cuts.values()) > _HELD_BELOW * call.inside_bytes:
            return inner_cuts
        cut = _cut(module, call, trials)
        return {name: cut} if cut is not None else inner_cuts

    return choose("", model)


def budget_bytes(model: nn.Module, calls: Mapping[str, ModuleCall], parts: int, trials: ChunkTrials) -> int:
    """Return the bytes that one slice of a module may allocate inside. They follow from the one module that
    allocates the most inside among those that `find_cuts` would cut without a budget, and are 0 if there are
    none.

    If ``parts`` is not 0, they are this module's inner bytes divided by ``parts``. If it is 0, they are half
    of the module's output, which exists anyway, but at most half of its inner bytes."""
    sizes = [(calls[n].inside_bytes, calls[n].out_bytes) for n in find_cuts(model, calls, 0, trials)]
    inside_bytes, out_bytes = max(sizes, default=(0, 0))
    return inside_bytes // parts if parts else min(inside_bytes, out_bytes) // 2


def worth_cutting(job: Any, model: nn.Module) -> bool:
    """Return whether some module allocates inside more than 4 times its output and is cut along an axis other
    than the first (that of the batch) when `find_cuts` runs with `budget_bytes` of 0 parts. False if sizes in
    the model depend on values, as where tokens are routed to experts. Raises UserError if the job's loss
    cannot be computed on a copy of the model without values for another reason."""
    try:
        calls, trials = first_calls(job, model), ChunkTrials()
    except (UserError, *_OF_VALUES) as error:
        if not isinstance(error.__cause__ or error, _OF_VALUES):
            raise
        return False
    cuts = find_cuts(model, calls, budget_bytes(model, calls, 0, trials), trials)
    return any(c.axes[c.first] > 0 and c.inside_bytes > _WORTH * calls[n].out_bytes for n, c in cuts.items())


# -- trial -----------------------------------------------------------------------------------------------


def _cut(module: nn.Module, call: ModuleCall, trials: ChunkTrials) -> ChunkCut | None:
    if call.random or call.out_shape is None:
        return None
    tensors = {i: t for i, t in enumerate(call.leaves) if isinstance(t, torch.Tensor)}
    if not 0 < len(tensors) <= _MOST_TENSORS or not all(t.is_floating_point() for t in tensors.values()):
        return None
    if sum(p.numel() for p in module.parameters()) > _MOST_PARAMETERS:
        return None
    if not all(buffer.is_floating_point() for buffer in module.buffers()):
        return None  # indices drawn at random would be out of range
    shapes = {i: tuple(t.shape) for i, t in tensors.items()}
    form = _form(call.leaves, call.spec)
    kinds = tuple((n, type(m)) for n, m in module.named_modules())
    parameters = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
    constants = _constants(module)
    key = (kinds, tuple(shapes.items()), form, parameters, constants)
    is_lasting = not any(_BY_ID in text for text in (*constants, *map(str, form)))
    result = trials.result(key, lambda: find_cut(module, call, shapes), is_lasting=is_lasting)
    if result is None:
        return None
    axes, out_axis = result
    first_leaf = next(iter(axes))
    return ChunkCut(
        axes=axes,
        first=first_leaf,
        out_axis=out_axis,
        inside_bytes=call.inside_bytes,
        first_count=math.prod(shapes[first_leaf]),
        form=form,
    )


# torch's own attributes, and what techniques wrap around a module.
_NOT_CONSTANT = {*vars(nn.Module()), "forward"}


def _constants(module: nn.Module) -> tuple[str, ...]:
    """Return texts "path.attribute=value" for the attributes of the module and its submodules that are
    neither torch's own nor ``forward``, such as the axis over which they sum. Modules of the same classes and
    shapes may differ in these."""
    return tuple(
        f"{name}.{k}={_state_text(v)}"
        for name, m in module.named_modules()
        for k, v in vars(m).items()
        if k not in _NOT_CONSTANT
    )


def _state_text(value: Any, depth: int = 3) -> str:
    """Return a text that is equal for equal values. A value of an unknown kind, such as a tensor or a
    function, or nested more than ``depth`` levels deep, has a text of its own, by its id."""
    if value is None or isinstance(value, int | float | str | bool | torch.dtype | torch.device):
        return repr(value)
    if depth and isinstance(value, tuple | list):
        return f"{type(value)}{[_state_text(v, depth - 1) for v in value]}"
    if depth and isinstance(value, dict):
        return str({str(k): _state_text(v, depth - 1) for k, v in value.items()})
    is_plain = not isinstance(value, torch.Tensor | nn.Module) and not callable(value)
    if depth and is_plain and hasattr(value, "__dict__"):
        return f"{type(value)}{_state_text(vars(value), depth - 1)}"
    return f"{type(value)}{_BY_ID}{id(value)}"


_BY_ID = "\0"  # no text of a value has it
