"""Facts about operators that do not depend on a trace: which do no work, how many operations they count, and
which torch runs in place on plain tensors. Also ways to run operators on fake tensors quickly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers its operators
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from memfit.techniques.recompute.op_numbering import written_tensors
from memfit.trace.data_dependent import Guesses
from memfit.trace.signature import describe, dtype_name, moved_bytes
from memfit.types.errors import UserError
from memfit.types.trace import OpCall, Phase


@dataclasses.dataclass(frozen=True, slots=True)
class OperatorFact:
    """Constant facts about an operator.

    ``name`` is like "aten.add.Tensor". ``silent`` operators do no work, such as views. Of these, only
    `MAKERS`, which leave a new storage unfilled, make a storage. ``composite`` operators are made of others;
    below autograd, as in DTensor's own code, they reach the dispatcher undecomposed. ``resizes``: the
    operator changes the size of a storage.
    """

    name: str
    silent: bool
    composite: bool
    resizes: bool
    count: Callable[..., int] | None  # counts floating-point operations


@dataclasses.dataclass(frozen=True, slots=True)
class OperatorWork:
    """What all calls of an operator with equal arguments have in common. ``signature`` is the JSON text of
    `describe`. ``dtype`` is the name of the dtype of the arithmetic, such as "float32". ``flops`` is 0 for an
    operator without a formula. ``moved_bytes`` counts inputs read and outputs written."""

    signature: str
    dtype: str
    flops: int
    moved_bytes: int


@functools.cache
def fact(func: Any) -> OperatorFact:
    """Return the facts about an operator, such as ``torch.ops.aten.add.Tensor``. They are kept for later
    calls."""
    count = _FLOPS.get(func) or flop_registry.get(func.overloadpacket)
    silent = bool(func.is_view) or func in MAKERS or func in _NO_WORK or func.namespace == "profiler"
    resizes = "resize" in func._schema.name or func._schema.name.endswith("set_")
    return OperatorFact(str(func), silent, _composite(func), resizes, count)


def _composite(func: Any) -> bool:
    if func.namespace != "aten":
        return False
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return bool(has_kernel("CompositeImplicitAutograd") and not has_kernel("CPU"))


def view(func: Any, args: Any, kwargs: Any) -> FakeTensor | list[FakeTensor] | None:
    """Return the result of a common view operator, such as transpose or split, on a fake tensor, in half the
    time that the fake mode takes. Return None, without running it, for other operators, for calls with
    keyword arguments, and if the first argument is not a fake tensor or has known values (``constant``)."""
    if func not in _VIEWS or kwargs or type(args[0]) is not FakeTensor or args[0].constant is not None:
        return None
    mode = args[0].fake_mode
    # What torch's in_kernel_invocation_manager does: fake tensors act as the meta tensors that they wrap.
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        mode.in_kernel_invocation = True
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            out = func(*args)
        finally:
            mode.in_kernel_invocation = False
    device = args[0].fake_device
    return make_fake(mode, out, device) if func not in _SPLITS else [make_fake(mode, t, device) for t in out]


_STATE: dict[torch.device, dict[str, Any]] = {}  # attributes of a fake tensor by device, except its mode


def make_fake(mode: FakeTensorMode, meta: torch.Tensor, device: torch.device) -> FakeTensor:
    """Return `FakeTensor(mode, meta, device)`: a fake tensor on ``device`` with the layout of ``meta``. After
    the first one on a device, its constructor's checks are skipped, because they take longer than the
    operator."""
    state = _STATE.get(device)
    if state is None:
        fake = FakeTensor(mode, meta, device)
        _STATE[device] = {k: v for k, v in vars(fake).items() if k != "fake_mode"}
        return fake
    fake = torch.Tensor._make_subclass(
        FakeTensor, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=device
    )
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
    else:
        torch._C._set_throw_on_mutable_data_ptr(fake)
    vars(fake).update(state, fake_mode=mode)
    return fake


@dataclasses.dataclass(frozen=True, slots=True)
class NewTensors:
    """The layouts of the new tensors that an operator makes whenever it is called with equal arguments.
    ``make(mode)`` makes such tensors as fake tensors of a mode.

    ``layouts`` holds (size, stride, dtype, device) of each. ``container``: tuple or list, which the operator
    returns; None if it returns a tensor. ``left_out``: places in the container that hold None, as for
    gradients that were not asked for.
    """

    layouts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]
    container: type | None
    left_out: tuple[int, ...] = ()

    def make(self, mode: FakeTensorMode) -> Any:
        with torch._C._DisableTorchDispatch():
            metas = [
                (torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)
                for size, stride, dtype, device in self.layouts
            ]
        out: list[Any] = [make_fake(mode, meta, device) for meta, device in metas]
        for place in self.left_out:
            out.insert(place, None)
        return self.container(out) if self.container else out[0]


def _lift(mode: FakeTensorMode, real: torch.Tensor) -> FakeTensor:
    """Return the fake tensor of a real one without dimensions, such as an optimizer's step counter. It knows
    its value (``constant``), as the result of FakeTensorMode.from_tensor does, which takes ten times longer.
    """
    with torch._C._DisableTorchDispatch():
        meta = torch.empty((), dtype=real.dtype, device="meta")
    fake = make_fake(mode, meta, real.device)
    fake.constant = real
    mode.fake_tensor_converter.add_constant_storage_mapping(fake)
    mode.fake_tensor_converter.set_tensor_memo(real, fake)  # an operator that writes into it returns it
    return fake


@functools.cache
def only_writes(func: Any) -> bool:
    """Return whether an ATen operator only writes element by element, or random numbers, into its first
    argument and returns it, such as ``aten.add_.Tensor`` and most operators of an optimizer step."""
    if func in _WRITERS:
        return True
    arguments, returns = func._schema.arguments, func._schema.returns
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    return (
        func.namespace == "aten"
        and (torch.Tag.pointwise in func.tags or torch.Tag.nondeterministic_seeded in func.tags)
        and writes.count(True) == 1
        and writes[0]
        and len(returns) == 1
        and returns[0].alias_info is not None
    )


@functools.cache
def only_writes_list(func: Any) -> bool:
    """Return whether an operator only writes element by element into tensors and returns nothing: one of ATen
    that writes into its first argument, a list, such as ``aten._foreach_add_.List`` in an optimizer step, or
    the update of an optimizer of bitsandbytes."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if func.namespace == "bitsandbytes":
        return not returns and func._schema.is_mutable
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    is_foreach = func.namespace == "aten" and func._schema.name.startswith("aten::_foreach_")
    return is_foreach and not returns and writes[0] and writes.count(True) == 1


def new_tensors(func: Any, inputs: list[torch.Tensor], out: Any) -> NewTensors | None:
    """Return how to make the outputs ``out`` again for equal arguments, of which ``inputs`` are the tensors.
    Return None if the operator is not of ATen or writes to an argument, if a tensor has known values
    (``constant``), or if an output is not a new fake tensor that fills a storage of its own."""
    places = list(out) if isinstance(out, list | tuple) else [out]
    outputs = [t for t in places if t is not None]
    if func.namespace != "aten" or func._schema.is_mutable:
        return None
    input_storages = {t.untyped_storage()._cdata for t in inputs}
    if not outputs or not all(
        type(t) is FakeTensor and t.constant is None and fills_storage(t) for t in outputs
    ):
        return None
    output_storages = {t.untyped_storage()._cdata for t in outputs}
    if (
        output_storages & input_storages
        or len(output_storages) < len(outputs)
        or any(getattr(t, "constant", None) is not None for t in inputs)
    ):
        return None
    layouts = _layouts(outputs, type(out) if isinstance(out, list | tuple) else None)
    left_out = tuple(place for place, t in enumerate(places) if t is None)
    return dataclasses.replace(layouts, left_out=left_out)


def storage_layout(tensor: torch.Tensor) -> NewTensors | None:
    """Return how to make a new tensor of the same layout in a storage that is just large enough for it.
    Return None unless ``tensor`` is a dense fake tensor that begins where its storage does."""
    return _layouts([tensor], None) if type(tensor) is FakeTensor and _at_start(tensor) else None


def _layouts(tensors: list[Any], container: type | None) -> NewTensors:
    return NewTensors(tuple((t.size(), t.stride(), t.dtype, t.fake_device) for t in tensors), container)


_KEPT_CALLS = 50_000
# Of all traces of this process: by the `call_key`, what an operator makes, whether it changes only values
# (True) or must be run each time (None); by (kind of device, `call_key`), its work.
_RESULTS: dict[Any, NewTensors | bool | None] = {}
_WORKS: dict[Any, OperatorWork] = {}


def call_key(func: Any, args: Any, kwargs: Any) -> Any:
    """Return a hashable key that is equal for calls of an operator with equal arguments (`key`) under equal
    default dtypes. Raises what `key` raises."""
    return func, torch.get_default_dtype(), key(args), key(kwargs) if kwargs else ()


class Results:
    """Results of operators in one trace, on fake tensors of one mode. Of equal calls in a process, torch
    computes only the first, if the result depends on nothing but the layouts of the arguments."""

    def __init__(self, guesses: Guesses, device: str) -> None:
        self._guesses, self._device = guesses, device
        self._mode: FakeTensorMode | None = None
        for kept in (_RESULTS, _WORKS):
            if len(kept) > _KEPT_CALLS:
                kept.clear()

    def of(self, call: Any, func: Any, args: Any, kwargs: Any, values: Any = None) -> Any:
        """Return the operator's result on fake tensors: usually new tensors; the first argument for an
        operator that `only_writes`; None for one that `only_writes_list`. ``call`` is the `call_key`, and
        ``values`` is as in `Guesses.call`. Raises what `Guesses.call` raises."""
        entry = _RESULTS.get(call)
        if entry is True:
            if only_writes_list(func):
                if not _has_constant(args[0] if func.namespace == "aten" else args):
                    return None
            elif type(args[0]) is FakeTensor and args[0].constant is None:  # a real one is written to
                return args[0]
        elif entry and self._mode is not None and not self._guesses.decides(func) and not _has_constant(args):
            return entry.make(self._mode)
        out = _with_kernel_strides(func, args, self._guesses.call(func, args, kwargs, values))
        if (only_writes(func) and out is args[0] and type(out) is FakeTensor) or only_writes_list(func):
            _RESULTS[call] = True
        elif not self._guesses.decides(func):
            if call not in _RESULTS:
                _RESULTS[call] = new_tensors(func, tensors_in(args, kwargs), out)
            self._mode = self._mode or next(
                (t.fake_mode for t in tensors_in(out) if type(t) is FakeTensor), None
            )
        return out

    def lifted(self, real: Any) -> FakeTensor | None:
        """Return the fake tensor of a real one without dimensions, which knows its value. Return None for
        another tensor, or if the mode is not known yet."""
        if self._mode is None or type(real) is not torch.Tensor or real.dim():
            return None
        return _lift(self._mode, real)

    def work(self, call: Any, func: Any, of: OperatorFact, args: Any, kwargs: Any, out: Any) -> OperatorWork:
        """Return what `work` returns for the call, computed once per process for equal calls on a device.
        ``call`` is the `call_key`. Raises what `work` raises."""
        entry = _WORKS.get((self._device, call))
        if entry is None:
            entry = _WORKS[self._device, call] = work(func, of, args, kwargs, out)
        return entry

    def built(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator of a model's construction that is not recorded, and return its result. Filling a
        fake tensor with zeros, a constant, or uniform or normal numbers is skipped, because fake parameters
        need no initialisation: the tensor is returned. Errors of the operator are raised."""
        if func in _INITIALISERS and type(args[0]) is FakeTensor and args[0].constant is None:
            return args[0]
        if func in MAKERS:
            return self.of(call_key(func, args, kwargs), func, args, kwargs)
        fake_view = view(func, args, kwargs)
        return func(*args, **kwargs) if fake_view is None else fake_view


def _has_constant(args: Any) -> bool:
    """Return whether torch knows the value of one of the arguments (``constant``), and so perhaps that of the
    result. Tensors in lists are not looked at."""
    return any(getattr(a, "constant", None) is not None for a in args)


def _with_kernel_strides(func: Any, args: Any, out: Any) -> Any:
    """Return ``out``, the fake result of an operator, or a tensor in its place with the strides that a real
    kernel gives it, if the operator is pointwise or the gradient of a pointwise loss.

    Of contiguous operands of one shape, kernels make contiguous results (compute_fast_setup_type in
    aten/src/ATen/TensorIterator.cpp). Channels-last images of one channel or one pixel are contiguous, too;
    torch's fake implementations keep their strides. Gradients of losses are contiguous in any case
    (aten/src/ATen/native/Loss.cpp).
    """
    if type(out) is not FakeTensor or func._schema.is_mutable:
        return out
    if func not in _CONTIGUOUS_GRADIENTS:
        is_pointwise = torch.Tag.pointwise in func.tags or func in _UNTAGGED
        kinds = [str(a.type) for a in func._schema.arguments]
        operands = [a for a, kind in zip(args, kinds, strict=False) if kind == "Tensor"]
        if not is_pointwise or func is _CLONE or not all(_is_contiguous(a, out.shape) for a in operands):
            return out
    strides = make_contiguous_strides_for(out.shape)
    return out if out.stride() == strides else out.new_empty_strided(out.shape, strides)


def _is_contiguous(operand: Any, shape: torch.Size) -> bool:
    return isinstance(operand, torch.Tensor) and operand.shape == shape and operand.is_contiguous()


def _at_start(tensor: torch.Tensor) -> bool:
    is_dense = tensor.layout is torch.strided
    return is_dense and not (tensor.storage_offset() or tensor.is_conj() or tensor.is_neg())


def fills_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense and begins and ends where its storage does. False for a view that is
    conjugated or negated when it is read."""
    if not _at_start(tensor):
        return False
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    elements = last + 1 if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() == elements * tensor.element_size()


def work(func: Any, of: OperatorFact, args: Any, kwargs: Any, out: Any) -> OperatorWork:
    """Return the signature, dtype, floating-point operations and bytes moved of a call of the operator with
    the facts ``of``, whose output is ``out``.

    Of a table that the operator indexes, only as many bytes as its output has count as read. Targets that it
    overwrites, and the inputs of nll_loss, do not count as read. An operator of memfit's own
    (techniques/synthetic_kernel.py) says its operations, its bytes read and its dtype by arguments. Raises
    UserError for a sparse output.
    """
    inputs, outputs = tensors_in(args, kwargs), tensors_in(out)
    if any(map(is_sparse, outputs)):
        raise UserError(
            f"the step makes a sparse tensor by {of.name}, whose size depends on the data",
            allowed="dense tensors, and sparse ones that the step makes by torch.sparse_coo_tensor",
        )
    dtype, flops, total_bytes = _dtype(inputs + outputs), 0, 0
    if func.namespace == "memfit":  # techniques/synthetic_kernel.py
        total_bytes, flops, dtype = args[1], args[2], args[5] or dtype
    elif of.count:
        flops = int(of.count(*args, **kwargs, out_val=out))
    if of.name in _TAKE_ROWS:
        inputs = [*inputs[1:], *outputs]
    elif of.name in _PICK_ELEMENTS:
        inputs = []
    elif of.name in _WRITE_ONLY:
        inputs = inputs[len(tensors_in(args[0])) :]
    targets = outputs or written_tensors(func, args, kwargs)  # a foreach operator returns nothing
    total_bytes += moved_bytes(inputs + targets)
    return OperatorWork(describe(of.name, args, kwargs), dtype, flops, total_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class OperatorCall:
    """One recorded call. ``clock`` is the recorder's when the call began. ``stream_use`` is (stream, process
    group, wait), or None for a call on the model's stream. The process group is "" unless the call is a
    collective. The wait is (awaited stream, number of that stream's last calls that are not waited for), or
    None if the call does not wait."""

    clock: int
    name: str
    work: OperatorWork
    phase: Phase
    step: int
    module: str
    stream_use: tuple[str, str, tuple[str, int] | None] | None = None
    times: int = 1  # as of `OpCall`

    @property
    def is_collective(self) -> bool:
        return self.stream_use is not None and bool(self.stream_use[1])

    def finish(self) -> OpCall:
        stream, group, waits = self.stream_use or ("", "", None)
        return OpCall(
            clock=self.clock,
            op=self.name,
            signature=self.work.signature,
            phase=self.phase,
            step=self.step,
            module=self.module,
            dtype=self.work.dtype,
            flops=self.work.flops,
            moved_bytes=self.work.moved_bytes,
            stream=stream,
            group=group,
            waits=waits,
            times=self.times,
        )


def key(value: Any) -> Any:
    """Return a hashable key of an argument or of several. It is equal for tensors of equal shape, stride,
    dtype, device, conjugation and storage size, and for equal plain values: those of the same type whose
    texts are equal. Raises UserError for a tensor that is not dense."""
    kind = type(value)
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise UserError(
            f"the step computes with a {layout} tensor that it did not make by torch.sparse_coo_tensor, such "
            "as a buffer of the model or a part of the batch",
            allowed="dense tensors, and sparse ones that the step makes by torch.sparse_coo_tensor",
        )
    if kind is FakeTensor:  # whose ``device`` would be another call of the dispatcher
        return (
            value.shape,
            value.stride(),
            value.dtype,
            value.fake_device,
            value.is_conj(),
            value.untyped_storage().nbytes(),
        )
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return (value.shape, value.stride(), value.dtype, value.device, value.is_conj(), storage.nbytes())
    if kind is tuple or isinstance(value, list | tuple):
        return tuple([key(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, key(v)) for k, v in value.items()])
    return value if kind is int or value is None else (kind, str(value))


def is_sparse(value: Any) -> bool:
    """Return whether ``value`` is a sparse COO tensor."""
    return isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo


def decomposition(func: Any, fact: OperatorFact, args: Any) -> Callable[..., Any] | None:
    """Return a function with the operator's arguments that makes the calls of which the operator consists,
    and returns its result. Return None if the operator is to be recorded as one call."""
    if fact.composite:
        return func.decompose  # type: ignore[no-any-return]
    if func is _ATEN._transformer_encoder_layer_fwd.default:
        return _encoder_layer
    return _sparse_bag_backward if func is _BAG_BACKWARD and args[_IS_SPARSE_BAG] else None


def _sparse_bag_backward(
    grad: Any, indices: Any, offsets: Any, bag_of: Any, sizes: Any, most: Any, rows: int, *rest: Any
) -> Any:
    """Return the sparse gradient of an embedding bag's weights, made by the same calls as in torch's
    ``_embedding_bag_sparse_backward`` (aten/src/ATen/native/EmbeddingBag.cpp). The arguments are those of
    ``_embedding_bag_backward``."""
    scales_by_count, mode, _, sample_weights, padding = (*rest, -1)[:5]
    if bag_of.numel() != indices.numel():
        bag_of = torch.zeros_like(indices).cumsum(0)
    of_index = grad.index_select(0, bag_of)
    if mode == _MEAN:
        of_index = of_index * sizes.to(grad.dtype).reciprocal().index_select(0, bag_of).unsqueeze(1)
    if sample_weights is not None:
        of_index = of_index * sample_weights.unsqueeze(1)
    return _ATEN.embedding_backward(of_index, indices, rows, padding, scales_by_count, True)


def _encoder_layer(
    src: Any,
    width: int,
    heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    out_weight: Any,
    out_bias: Any,
    *rest: Any,
) -> Any:
    """Return the output of a transformer's encoder layer in evaluation, made by the same calls as in torch's
    ``transformer_encoder_layer_forward`` on the CPU (aten/src/ATen/native/transformers/transformer.cpp). The
    arguments are those of the operator ``_transformer_encoder_layer_fwd``."""
    use_gelu, norm_first, eps = rest[:3]
    norms, weights, masks = (rest[3:5], rest[5:7]), (rest[7:9], rest[9:11]), (*rest[11:], None)

    def norm(x: Any, index: int) -> Any:
        return _ATEN.native_layer_norm(x, (width,), *norms[index], eps)[0]

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        return _ATEN.addmm(bias, x.view(-1, x.shape[-1]), weight.t())

    x = norm(src, 0) if norm_first else src
    x = linear(_attend(x, heads, qkv_weight, masks[0]), out_weight, out_bias).view(src.shape)
    x.add_(src)
    x = x if norm_first else norm(x, 0)
    before = x
    x = norm(x, 1) if norm_first else x
    hidden = linear(x, *weights[0])
    hidden = _ATEN.gelu_(hidden) if use_gelu else _ATEN.relu_(hidden)
    x = linear(hidden, *weights[1]).view(src.shape)
    del hidden
    x.add_(before)
    return x if norm_first else norm(x, 1)


def _attend(x: Any, heads: int, qkv_weight: Any, mask: Any) -> Any:
    """Return the input of the output projection in self-attention of ``x``. Both have the shape (batch,
    length, width). The calls are those of ``native_multi_head_attention`` (aten/src/ATen/native/transformers/
    attention.cpp): queries, keys and values share a storage, and softmax without a mask and the second
    product overwrite their inputs."""
    batch, length, width = x.shape
    qkv = _ATEN.mm(x.reshape(-1, width), qkv_weight.t())
    parts = qkv.new_empty(3, batch * heads, length, width // heads)
    del qkv
    query, key_, value = parts.unbind(0)
    scores = _ATEN.bmm(query, key_.transpose(1, 2))
    if mask is not None:
        mask = mask.to(torch.bool)
        scores = _ATEN._softmax(scores, -1, False)
    _ATEN.bmm.out(scores, value, out=query)
    del scores
    heads_apart = query.view(batch, heads, length, -1)
    return heads_apart.transpose(1, 2).contiguous().view(batch, length, width)


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Return the tensors among ``values``, and inside lists, tuples and dicts there, in order. The walk is
    hand-written because it runs for every operator."""
    tensors: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += tensors_in(*value)
        elif isinstance(value, dict):
            tensors += tensors_in(*value.values())
    return tensors


def _dtype(tensors: list[torch.Tensor]) -> str:
    """Return the name of the dtype of the arithmetic: that of the first floating-point or complex tensor,
    else "int64"."""
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            return dtype_name(tensor.dtype)
    return "int64"


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Return the floating-point operations of the two products of attention: 2 x batch x heads x queries x
    keys x (head dim of the keys + head dim of the values). Shapes are (batch, heads, length, head dim)."""
    batch, heads, queries, dim = query.shape
    return int(2 * batch * heads * queries * key.shape[2] * (dim + value.shape[3]))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Return the floating-point operations of the five products of attention's backward (the scores again,
    then dV, dP, dQ, dK): 5/2 of those of `_attention_flops`."""
    return _attention_flops(query, key, value) * 5 // 2


def _convolution_backward_flops(
    grad: Any, x: Any, weight: Any, bias_sizes: Any, *rest: Any, **options: Any
) -> int:
    """Return the floating-point operations of a convolution's backward: those of its forward for each
    gradient of ``x`` and ``weight`` that is requested. Torch's own formula counts the gradient of the weight
    once for each group."""
    _, _, _, transposed, _, _, requested = rest
    return int(sum(requested[:2]) * conv_flop_count(x.shape, weight.shape, grad.shape, transposed))


_ATEN: Any = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {  # in place of torch's formulas, or where it has none
    _ATEN.convolution_backward.default: _convolution_backward_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward_flops,
}
_TAKE_ROWS = frozenset(
    {"aten.embedding.default", "aten.index_select.default", "aten.gather.default", "aten.index.Tensor"}
)
# One element per row.
_PICK_ELEMENTS = frozenset({"aten.nll_loss_forward.default", "aten.nll_loss_backward.default"})
_WRITE_ONLY = frozenset(
    {
        "aten.copy_.default",
        "aten.fill_.Scalar",
        "aten.fill_.Tensor",
        "aten.zero_.default",
        "aten._foreach_copy_.default",
        "aten._foreach_zero_.default",
        "memfit.kernel.default",
    }
)
ITEM = _ATEN._local_scalar_dense.default
ADD = _ATEN.add.Tensor
SCATTER_ADD = _ATEN.scatter_add.default
_CLONE = _ATEN.clone.default
_CONTIGUOUS_GRADIENTS = frozenset(
    {
        _ATEN.mse_loss_backward.default,
        _ATEN.smooth_l1_loss_backward.default,
        _ATEN.huber_loss_backward.default,
    }
)
_UNTAGGED = frozenset(  # pointwise operators without torch's tag
    {
        _ATEN.hardswish.default,
        _ATEN.elu_backward.default,
        _ATEN.hardsigmoid_backward.default,
        _ATEN.hardswish_backward.default,
        _ATEN.hardtanh_backward.default,
        _ATEN.leaky_relu_backward.default,
        _ATEN.mish_backward.default,
        _ATEN.softplus_backward.default,
    }
)
IN_PLACE = {
    ADD: _ATEN.add_.Tensor,
    _ATEN.index_put.default: _ATEN.index_put_.default,
    _ATEN.index_add.default: _ATEN.index_add_.default,
    SCATTER_ADD: _ATEN.scatter_add_.default,
    _ATEN.scatter.src: _ATEN.scatter_.src,
    _ATEN.scatter.value: _ATEN.scatter_.value,
    _ATEN.put.default: _ATEN.put_.default,
    _ATEN.sub.Tensor: _ATEN.sub_.Tensor,
    _ATEN.mul.Tensor: _ATEN.mul_.Tensor,
}
OF_LOGITS = frozenset({_ATEN.sub.Tensor, _ATEN.mul.Tensor})  # run in place in a single formula only
WIDE_LOSSES = frozenset(
    {_ATEN.mse_loss.default, _ATEN.smooth_l1_loss.default, _ATEN.binary_cross_entropy.default}
)
SLIDING_WINDOWS = frozenset({_ATEN.im2col.default, _ATEN.col2im.default})  # F.unfold and F.fold
GROUP_NORM = _ATEN.native_group_norm.default
LAYER_NORMS = frozenset({_ATEN.native_layer_norm.default, _ATEN.native_layer_norm_backward.default})
BATCH_NORMS = frozenset({_ATEN.native_batch_norm.default, _ATEN.native_batch_norm_backward.default})
NORM_GRADIENTS = frozenset(
    {
        _ATEN.native_layer_norm_backward.default,
        _ATEN.native_group_norm_backward.default,
        _ATEN.native_batch_norm_backward.default,
    }
)
SPARSE_MAKERS = frozenset(
    {
        _ATEN._sparse_coo_tensor_with_dims_and_tensors.default,
        _ATEN._sparse_coo_tensor_unsafe.default,
        _ATEN.sparse_coo_tensor.indices_size,
    }
)
IS_COALESCED = _ATEN.is_coalesced.default
COALESCE = _ATEN._coalesce.default
_MEAN = 1  # mode of an embedding bag
_BAG_BACKWARD = _ATEN._embedding_bag_backward.default
_IS_SPARSE_BAG = 9  # its argument
SOFTMAX_BACKWARD = _ATEN._softmax_backward_data.default
NORMS = NORM_GRADIENTS | LAYER_NORMS | BATCH_NORMS | {GROUP_NORM}
LIFT = _ATEN.lift_fresh.default
_COMM: Any = torch.ops._c10d_functional
WAIT, COMING = _COMM.wait_tensor.default, _COMM._wrap_tensor_autograd.default
SENDING = frozenset(
    {
        _COMM.all_gather_into_tensor.default,
        _COMM.reduce_scatter_tensor.default,
        _COMM.all_to_all_single.default,
    }
)
_VIEWS = frozenset(
    {
        _ATEN.view.default,
        _ATEN.t.default,
        _ATEN.transpose.int,
        _ATEN.slice.Tensor,
        _ATEN.as_strided.default,
        _ATEN.unsqueeze.default,
        _ATEN.expand.default,
        _ATEN.permute.default,
        _ATEN.select.int,
        _ATEN.detach.default,
        _ATEN.alias.default,
        _ATEN._unsafe_view.default,
        _ATEN.squeeze.dim,
        _ATEN.split.Tensor,
        _ATEN.split_with_sizes.default,
        _ATEN.unbind.int,
    }
)
_SPLITS = frozenset({_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.unbind.int})
_WRITERS = frozenset({_ATEN.zero_.default, _ATEN.copy_.default, _ATEN.masked_fill_.Scalar})
_INITIALISERS = frozenset(
    {_ATEN.normal_.default, _ATEN.uniform_.default, _ATEN.fill_.Scalar, _ATEN.zero_.default}
)
_NO_WORK = frozenset({_ATEN.detach.default, _ATEN._unsafe_view.default, torch.ops.prim.device.default})
MAKERS = frozenset({_ATEN.empty.memory_format, _ATEN.empty_strided.default})  # make a storage but do no work
