"""A model seen as a chain of blocks: which parameters are used where, and which tensors pass from block to
block.

This is found from one forward and loss on fake tensors. Positions: -1 is everything before the first block,
``i`` is block i, and ``len(blocks)`` is everything after the last. A model is a chain if each position reads
only parameters and what the position just before it made. Otherwise cutting it would change its numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass_type,
)

from memfit.model.batch_objects import map_batch
from memfit.model.blocks import child_prefix, equal_blocks, find_blocks
from memfit.model.tensors import plain_tensors, tensor_leaves
from memfit.techniques.base import Workbench
from memfit.types.errors import UserError

_ITEM = torch.ops.aten._local_scalar_dense.default
# Operators that read a tensor's shape and dtype but not its values.
_SHAPE_ONLY = (
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_empty_strided",
)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPlaceholder:
    """Stands for a tensor of this shape and dtype in a structure from which the tensors have been removed."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model whose blocks form a chain: each block reads only parameters and what the position just before
    it made. Positions are -1 (everything before the first block), the indices of the blocks, and
    ``len(blocks)`` (everything after the last).

    - ``path`` is the path of the module that contains the blocks.
    - ``uses`` maps each parameter's name to the positions at which it is used. A parameter of a block counts
      as used at that block in any case, and one that is in no block and used nowhere counts as used at -1.
    - ``carried`` has a mapping for each block, whose keys are indices in its flattened (args, kwargs): those
      of the tensors that the position before made. The values are `TensorPlaceholder`s.
    - ``returns`` holds what each block returns, with `TensorPlaceholder`s in place of tensors.
    - ``before`` maps names of modules to what they return, with `TensorPlaceholder`s in place of tensors.
      These modules are called once, before the first block, and have a parameter that is used only at -1.
    """

    path: str
    blocks: tuple[torch.nn.Module, ...]
    uses: Mapping[str, frozenset[int]]
    carried: tuple[Mapping[int, TensorPlaceholder], ...]
    returns: tuple[Any, ...]
    before: Mapping[str, Any]


def record_chain(bench: Workbench, parts: int) -> Chain:
    """Return the `Chain` of the workbench's model, as recorded in one forward pass and loss on fake tensors:
    those of the first of ``parts`` equal parts of the job's first batch.

    Raises UserError if no repeated blocks are found, if the loss does not call all of them, or if they do not
    form a chain.
    """
    path, blocks = find_blocks(bench.model, bench.job.blocks)
    with _disable_current_modes():
        batch = bench.first_part(parts)
        fake = detect_fake_mode(list(bench.model.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)
        with fake, _fake_tensors_of(bench.model, fake):
            names = {key: name for name, p in bench.model.named_parameters() for key in _storages(p)}
            recorder = _Recorder(names, path, blocks)
            part = map_batch(fake.from_tensor, batch)
            with torch.no_grad(), contextlib.ExitStack() as stack, recorder, recorder.watching(bench.model):
                # The compiler does not compile code that it has seen run under a mode.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for context in bench.forward_contexts:
                    stack.enter_context(context())
                bench.job.loss(bench.call or bench.model, part)
    if recorder.position != len(blocks):
        raise UserError(
            "pipeline cannot cut the model, because the job's loss does not call every block of "
            f"{path or 'the model'}",
            hint="set Job(blocks=...) to the path of a module of which the loss calls every child, in order",
        )
    for name, _ in bench.model.named_parameters():
        block_indices = [i for i in range(len(blocks)) if name.startswith(f"{child_prefix(path)}{i}.")]
        recorder.uses[name].update(block_indices or (() if recorder.uses[name] else (-1,)))
    return Chain(
        path=path,
        blocks=tuple(blocks),
        uses={
            n: frozenset(int(position) for position in positions) for n, positions in recorder.uses.items()
        },
        carried=tuple(recorder.carried),
        returns=tuple(recorder.returns),
        before=recorder.called_once(),
    )


class _Recorder(TorchDispatchMode):
    """Dispatch mode for one forward pass, from which `record_chain` makes the `Chain`. It notes at which
    position each tensor that depends on parameters was made and each parameter was used. ``names`` maps the
    keys of parameters' storages to parameter names. Raises UserError as soon as the model turns out not to be
    a chain."""

    def __init__(self, names: Mapping[int, str], path: str, blocks: list[torch.nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.path, self.blocks = names, path, blocks
        self.position: float = -1  # halves are between blocks
        self.uses: dict[str, set[float]] = defaultdict(set)
        self.carried: list[dict[int, TensorPlaceholder]] = []
        self.returns: list[Any] = []
        self._origin: dict[int, float] = {}
        self._kept: list[torch.Tensor] = []  # kept alive, so that no storage's address is reused
        self._called: dict[str, list[Any]] = defaultdict(list)
        self._twins = equal_blocks(blocks)
        # Index of a block -> (inputs, outputs), for blocks whose only effect is their output.
        self._ran: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        if any(kind is not FakeTensor and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        if func is _ITEM:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        out = func(*args, **kwargs)
        if func._overloadpacket.__name__ not in _SHAPE_ONLY:
            self._follow(func, tensor_leaves((args, kwargs)), tensor_leaves(out))
        return out

    def _follow(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        keys = [key for t in inputs for key in _storages(t)]
        params = {self.names[k] for k in keys if k in self.names}
        origins = {self._origin[k] for k in keys if k in self._origin}
        if not params and not origins:
            return
        if func.is_view:
            return
        if self.position % 1:
            raise self._broken(f"{func} works on a block's output between two blocks")
        if distant_origins := [o for o in origins if o not in (self.position, self.position - 1)]:
            raise self._broken(
                f"{self._place(self.position)} reads a tensor that {self._place(distant_origins[0])} made"
            )
        for name in params:
            self.uses[name].add(self.position)
        for tensor in outputs:
            for key in _storages(tensor):
                if key not in self.names:
                    self._origin[key] = self.position
            self._kept.append(tensor)

    def _broken(self, what_breaks_the_chain: str) -> UserError:
        return UserError(
            f"pipeline cannot cut the model, which is not a chain of blocks: {what_breaks_the_chain}",
            allowed=f"blocks in {self.path or 'the model'} that run once each, in order, and pass their "
            "output to the next one and to nothing else",
            hint="move what runs between the blocks into them, or name other blocks in Job(blocks=...)",
        )

    def _place(self, position: float) -> str:
        if position < 0:
            return "the part before the blocks"
        return "the part after the blocks" if position >= len(self.blocks) else f"block {int(position)}"

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        names = {id(m): n for n, m in model.named_modules()}
        stack: list[str] = []

        def enter(module: torch.nn.Module, args: Any) -> None:
            if self.position == -1 and id(module) in names:
                stack.append(names[id(module)])

        def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
            if self.position == -1 and id(module) in names and stack and stack[-1] == names[id(module)]:
                self._called[stack.pop()].append(with_placeholders(out))

        hooks = torch.nn.modules.module
        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
        for index, block in enumerate(self.blocks):
            block._compiled_call_impl = self._around(index, block)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _around(self, index: int, block: torch.nn.Module) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.position != (index - 0.5 if index else -1):
                name = f"{child_prefix(self.path)}{index}"
                raise self._broken(f"{name} is not called exactly once and in order")
            leaves = _pytree.tree_leaves((args, kwargs))
            self.carried.append(
                {
                    place: TensorPlaceholder(tuple(leaf.shape), leaf.dtype)
                    for place, leaf in enumerate(leaves)
                    if isinstance(leaf, torch.Tensor)
                    and any(self._origin.get(key) == index - 1 for key in _storages(leaf))
                }
            )
            self.position = index
            out = self._output(index, block, args, kwargs)
            self.returns.append(with_placeholders(out))
            self.position = index + (1 if index == len(self.blocks) - 1 else 0.5)
            return out

        return call

    def _output(self, index: int, block: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the output of block ``index``. If an equal earlier block has run with the same inputs
        (tensors of the same shapes and dtypes) and had no other effect than its output, the block is not run:
        return new tensors of the shapes and dtypes of that output."""
        inputs = (with_placeholders((args, kwargs)), self.carried[-1])
        if self._twins[index] in self._ran and _same(self._ran[self._twins[index]][0], inputs):
            out = _pytree.tree_map_only(torch.Tensor, torch.empty_like, self._ran[self._twins[index]][1])
            outputs = tensor_leaves(out)
            self._origin |= {key: index for t in outputs for key in _storages(t)}
            self._kept += outputs
            return out
        attribute_ids = _attribute_ids(block)
        out = block._call_impl(*args, **kwargs)
        reads_own_parameters = all(
            n.startswith(f"{child_prefix(self.path)}{index}.")
            for n, positions in self.uses.items()
            if index in positions
        )
        input_storages = {key for t in tensor_leaves((args, kwargs)) for key in _storages(t)}
        outputs_are_new = all(
            type(t) is FakeTensor and not input_storages & {*_storages(t)} for t in tensor_leaves(out)
        )
        if reads_own_parameters and outputs_are_new and attribute_ids == _attribute_ids(block):
            self._ran[index] = inputs, out
        return out

    def called_once(self) -> dict[str, Any]:
        """Return module name -> what the module returned, with `TensorPlaceholder`s in place of tensors, for
        the modules that were called once, entirely before the blocks, and that have a parameter that is used
        only before the blocks. Modules inside another such module are left out."""
        early_names = {n for n, positions in self.uses.items() if positions == {-1.0}}
        results: dict[str, Any] = {}
        for name, outs in sorted(self._called.items(), key=lambda pair: pair[0].count(".")):
            nested = any(name.startswith(f"{outer}.") for outer in results)
            if len(outs) == 1 and not nested and any(p.startswith(f"{name}.") for p in early_names):
                results[name] = outs[0]
        return results


def with_placeholders(value: Any) -> Any:
    """Return the same structure with a `TensorPlaceholder` in place of each tensor."""
    return _pytree.tree_map_only(torch.Tensor, lambda t: TensorPlaceholder(tuple(t.shape), t.dtype), value)


class ZeroFiller:
    """Puts zeros that take no memory in place of `TensorPlaceholder`s: each is an expanded view of a single
    zero of that dtype on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elements: dict[torch.dtype, torch.Tensor] = {}

    def fill(self, value: Any) -> Any:
        """Return the same structure with zeros in place of each `TensorPlaceholder`."""
        return _pytree.tree_map_only(TensorPlaceholder, self._like, value)

    def _like(self, hole: TensorPlaceholder) -> torch.Tensor:
        if hole.dtype not in self._elements:
            self._elements[hole.dtype] = torch.zeros((), dtype=hole.dtype, device=self._device)
        return self._elements[hole.dtype].expand(hole.shape)


@contextlib.contextmanager
def _fake_tensors_of(model: torch.nn.Module, fake: FakeTensorMode) -> Iterator[None]:
    """Replace the model's parameters and buffers by fake copies inside this context. Afterwards the
    attributes of all modules are as before; tables that a forward has cached there are gone."""
    module_states = [(module, dict(vars(module))) for module in model.modules()]
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in copies:
            is_fake = isinstance(tensor, FakeTensor)
            copies[id(tensor)] = tensor.detach() if is_fake else fake.from_tensor(tensor)
        return copies[id(tensor)]

    try:
        for module, attributes in module_states:
            for kind in ("_parameters", "_buffers"):
                vars(module)[kind] = {name: copy(tensor) for name, tensor in attributes[kind].items()}
        yield
    finally:
        for module, attributes in module_states:
            vars(module).clear()
            vars(module).update(attributes)


def _attribute_ids(block: torch.nn.Module) -> list[int]:
    """Return the ids of the values of all attributes of a block's modules. If the list differs before and
    after a call, the block has stored something in an attribute."""
    return [id(value) for m in block.modules() for value in vars(m).values()]


def _same(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except (RuntimeError, ValueError, TypeError):  # arguments that cannot be compared
        return False


def _storages(tensor: torch.Tensor) -> list[int]:
    return [plain.untyped_storage()._cdata for plain in plain_tensors(tensor)]
