"""Find which Linear layers of a block feed which, on fake tensors, for tensor parallelism.

A Linear fed by the block's own input can be split by columns (outputs). A Linear fed by such a Linear can be
split by rows (inputs), so that the pair needs one collective (Shoeybi et al. 2019, arXiv 1909.08053, section
3).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memfit.model.batch_objects import map_batch, split
from memfit.model.blocks import equal_blocks, is_within
from memfit.model.grouped_mm import grouped_products
from memfit.model.tensors import tensor_leaves

COLWISE, ROWWISE = "colwise", "rowwise"


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """A call of a module that is running. ``arguments``: the tensors that it received, each as (position or
    keyword, tensor)."""

    name: str
    arguments: tuple[tuple[int | str, torch.Tensor], ...]


@dataclasses.dataclass(slots=True)
class LinearUsage:
    """What was observed of a Linear in its first call. ``role``: "colwise", "rowwise", or "" if it is not to
    be split. ``input``: its input. ``within``: the modules of the block that were running, outermost first,
    the Linear itself last. ``output_dims``: number of dimensions of its input and output. ``parts``: number
    of equal parts into which its output is split, such as 3 for a fused query, key and value.
    ``reaches_rows``: whether the input of a row-split Linear depends on its output."""

    role: str
    input: torch.Tensor
    within: tuple[_Call, ...]
    output_dims: int
    parts: int = 1
    reaches_rows: bool = False


class PlaceholderValues(TorchDispatchMode):
    """Mode in which reading the value of a tensor without values, for example by ``.item()``, gives True for
    a boolean tensor and 1 for another, so that the model runs on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class LinearFlow(PlaceholderValues):
    """Mode that observes how Linear layers of blocks feed each other. ``roles`` maps names of Linears to
    roles, "" for names that are missing. If it is empty, roles follow from what is observed: a Linear whose
    input depends on the output of a column-split Linear is split by rows, any other by columns.

    ``linears``: name of a Linear -> what was observed of it, in the order in which they ran. ``views``: pairs
    (name of a column-split Linear, shape into which the features of its output are viewed, such as (heads,
    head dim)). ``inside``: name of a module that is not a Linear, has parameters of its own, and has a first
    input that depends on the output of a column-split Linear -> number of dimensions of that input."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        super().__init__()
        self.roles = roles
        self.linears: dict[str, LinearUsage] = {}
        self.views: list[tuple[str, tuple[int, ...]]] = []
        self.inside: dict[str, int] = {}
        self._stack: list[_Call] = []
        # By id of a tensor: the tensor, kept alive so that the id stays unique, and the modules that used it.
        self._used: dict[int, tuple[torch.Tensor, list[str]]] = {}

    def gather_at(self, name: str) -> tuple[str, int | str]:
        """Return (name of a module, position or keyword of its argument) at which the input of the Linear
        ``name`` can be gathered once for all Linears that read it. This is the outermost module around the
        Linear that receives that tensor and uses it only for Linears split by columns; if there is none, it
        is the Linear itself and position 0."""
        linear = self.linears[name]
        _, users = self._used.get(id(linear.input), (None, ()))
        for call in linear.within:
            is_used = any(is_within(user, call.name) for user in users)
            place = next((key for key, t in call.arguments if t is linear.input), None)
            if place is not None and not is_used:
                return call.name, place
        return name, 0

    def watch(self, model: nn.Module, blocks: Iterable[str]) -> None:
        """Add hooks that observe the modules of the blocks at these paths. The run is ended by an exception
        (`_Done`) after the last block."""
        paths = tuple(blocks)
        for name, module in model.named_modules():
            if not any(is_within(name, path) for path in paths):
                continue
            module.register_forward_pre_hook(self._entering(name, name in paths), with_kwargs=True)
            module.register_forward_hook(self._leaving(name, name == paths[-1]))

    def copy(self, block: str, twin: str) -> None:
        """Enter what was observed of the block at the path ``block`` also for the equal block at the path
        ``twin``, which was not run. Views are not copied."""

        def relocate(name: str) -> str:
            return twin + name[len(block) :] if is_within(name, block) else name

        for name in [n for n in self.linears if is_within(n, block)]:
            linear = self.linears[name]
            within = tuple(_Call(relocate(c.name), c.arguments) for c in linear.within)
            self.linears[relocate(name)] = dataclasses.replace(linear, within=within)
        self.inside |= {relocate(n): dims for n, dims in self.inside.items() if is_within(n, block)}
        for _, users in self._used.values():
            users += [relocate(user) for user in users if is_within(user, block)]

    def _entering(self, name: str, is_block: bool) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [(k, t) for k, t in (*enumerate(args), *kwargs.items()) if isinstance(t, torch.Tensor)]
            for _, tensor in tensors if is_block else ():
                _mark(tensor, frozenset(), None)
            self._stack.append(_Call(name, tuple(tensors)))
            input_tensor = tensors[0][1] if tensors else None
            if input_tensor is None:
                return
            if isinstance(module, nn.Linear):
                self._see(name, input_tensor)
            elif _sources(input_tensor) and any(True for _ in module.parameters(recurse=False)):
                self.inside[name] = input_tensor.dim()

        return enter

    def _see(self, name: str, tensor: torch.Tensor) -> None:
        columns = [s for s in _sources(tensor) if self.linears[s].role == COLWISE]
        role = self.roles.get(name, "") if self.roles else (ROWWISE if columns else COLWISE)
        self.linears.setdefault(name, LinearUsage(role, tensor, tuple(self._stack), tensor.dim()))
        if role == ROWWISE:
            for source in columns:
                self.linears[source].reaches_rows = True
        if role != COLWISE:
            self._use(tensor, name)

    def _use(self, tensor: torch.Tensor, user: str) -> None:
        self._used.setdefault(id(tensor), (tensor, []))[1].append(user)

    def _leaving(self, name: str, is_last: bool) -> Any:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()
            if isinstance(module, nn.Linear) and name in self.linears:
                is_colwise = self.linears[name].role == COLWISE
                _mark(
                    out,
                    frozenset([name] if is_colwise else ()),
                    (name, out.shape[-1]) if is_colwise else None,
                )
            if is_last:
                raise _Done

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = tensor_leaves((args, kwargs))
        module_name = self._stack[-1].name if self._stack else ""
        if module_name not in self.linears:
            for tensor in inputs:
                self._use(tensor, module_name)
        # Integers, such as a router's choice of experts, carry no features.
        sources = frozenset[str]().union(*(_sources(t) for t in inputs if t.is_floating_point()))
        for tensor in _pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                _mark(tensor, sources, self._cut(func, inputs[0], out) if inputs else None)
        return out

    def _cut(self, func: Any, tensor: torch.Tensor, out: Any) -> tuple[str, int] | None:
        """Return (name of the Linear, number of its features) for the output ``out`` of the operator
        ``func``, if ``tensor`` comes from the output of a column-split Linear, and ``out`` is its split into
        equal parts or a view that keeps all features in the last dimension. Else return None. Also enter the
        number of equal parts in ``linears`` and, in ``views``, a view that divides the features."""
        origin: tuple[str, int] | None = getattr(tensor, "_memfit_origin", None)
        if origin is None or func.overloadpacket.__name__ not in (
            "split",
            "split_with_sizes",
            "view",
            "_unsafe_view",
        ):
            return None
        name, width = origin
        if not isinstance(out, torch.Tensor):
            widths = {t.shape[-1] for t in out}
            if len(widths) == 1 and tensor.shape[-1] == width:
                self.linears[name].parts = len(out)
                return name, widths.pop()
            return None
        if out.shape[-1] == width:
            return origin
        tail = _tail(out.shape, width)
        if len(tail) > 2 and tail[0] <= 3:
            self.linears[name].parts = tail[0]
        self.views.append((name, tail))
        return None


class _Done(BaseException):
    """Ends the run after the last block. It is no Exception, because the job's own code is guarded against
    every Exception."""


def observe(
    job: Any, model: nn.Module, blocks: list[str], roles: Mapping[str, str], shrink: Any = None
) -> LinearFlow:
    """Run the job's loss on a copy of ``model`` whose tensors hold no values, and return the flow through the
    blocks (paths in the model, in their order), for the ``roles`` of Linears (see `LinearFlow`).
    ``shrink(copy)``, if set, may change that copy first. Modes that are active outside see nothing of the
    run.

    The run ends after the last block that has its own index in `equal_blocks`. What was observed of earlier
    blocks that equal the remaining ones is entered for these."""
    flow = LinearFlow(roles)
    twin_indices = _twins(model, blocks, roles)
    with without_values(job, model) as (model_copy, batch):
        if shrink is not None:
            shrink(model_copy)
        flow.watch(model_copy, blocks[: max(twin_indices) + 1])
        try:
            with flow:
                job.loss(model_copy, batch)
        except _Done:
            pass
    for name, twin in zip(
        blocks[max(twin_indices) + 1 :], twin_indices[max(twin_indices) + 1 :], strict=True
    ):
        flow.copy(blocks[twin], name)
    return flow


def _twins(model: nn.Module, blocks: list[str], roles: Mapping[str, str]) -> list[int]:
    """Return `equal_blocks` of the blocks at these paths, except that a block whose Linears have other
    ``roles`` than those of the block with its index gets its own index."""
    block_roles = [{(n[len(b) :], role) for n, role in roles.items() if is_within(n, b)} for b in blocks]
    twin_indices = equal_blocks([model.get_submodule(name) for name in blocks])
    return [twin if block_roles[twin] == block_roles[i] else i for i, twin in enumerate(twin_indices)]


@contextlib.contextmanager
def without_values(job: Any, model: nn.Module, parts: int = 1) -> Iterator[tuple[nn.Module, Any]]:
    """Yield (a copy of the model, the first of ``parts`` equal parts of the job's first batch), both without
    values, for a forward pass without gradients. Modes that are active outside see nothing of it. Raises
    UserError as `split` does, and errors of the job's make_batch."""
    with (
        grouped_products(),
        _disable_current_modes(),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        torch.no_grad(),
    ):
        copies = {id(t): _valueless(t) for t in (*model.parameters(), *model.buffers())}
        batch = map_batch(fake.from_tensor, split(job.make_batch(0, 0), parts)[0])
        yield copy.deepcopy(model, copies), batch


def _valueless(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _mark(tensor: Any, sources: frozenset[str], origin: tuple[str, int] | None) -> None:
    tensor._memfit_sources, tensor._memfit_origin = sources, origin


def _sources(tensor: torch.Tensor) -> frozenset[str]:
    sources: frozenset[str] = getattr(tensor, "_memfit_sources", frozenset())
    return sources


def _tail(shape: torch.Size, width: int) -> tuple[int, ...]:
    """Return the last dimensions of ``shape`` whose product is ``width``, as few as possible; the whole shape
    if no number of last dimensions has this product."""
    for start in range(len(shape) - 1, -1, -1):
        if math.prod(shape[start:]) == width:
            return tuple(shape[start:])
    return tuple(shape)
