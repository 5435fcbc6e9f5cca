"""Recurrent networks of a target device: LSTM, GRU and RNN of torch, for tensors on the CPU.

Torch runs a network as one kernel where the device has a library for it (cuDNN, MIOpen; of Apple's, for LSTMs
only), and otherwise step by step, with cells that are one kernel each on most devices
(aten/src/ATen/native/RNN.cpp). For tensors on the CPU it does neither.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from memfit.trace.signature import dtype_name
from memfit.types.device_kind import HOST, DeviceKind
from memfit.types.trace import UNKNOWN_BUFFER

_ATEN: Any = torch.ops.aten
_LSTM: Final = "lstm"
# Numbers that a layer keeps for backward per step and hidden unit besides its output: four gates and the cell
# state; three gates and the hidden state's part of the candidate; none.
_KEPT: Final = {_LSTM: 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def recurrent_kernels(kind: DeviceKind, note: Callable[[str], None]) -> Mapping[str, Callable[..., Any]]:
    """Return name in the namespace ``aten``, such as "lstm.input" -> implementation on devices of ``kind``,
    for the recurrent operators that run there as one kernel or with cells of one kernel; {} if none does.
    ``note`` is called with `UNKNOWN_BUFFER` when a network in training mode runs as one kernel."""
    kernels: dict[str, Callable[..., Any]] = {}
    if kind.fused_cells:
        kernels |= {"lstm_cell": _lstm_cell, "gru_cell": _gru_cell}
    for name in _KEPT:
        if kind.fused_cells or name in kind.one_kernel_networks:
            kernels[f"{name}.input"] = _padded_operator(name, name in kind.one_kernel_networks, note)
            kernels[f"{name}.data"] = _packed_operator(name, name in kind.one_kernel_networks, note)
    return kernels


# What torch lacks for fake tensors. It has the kernel of an LSTM's cell, but not without biases.
CELLS_ON_FAKES: Final[Mapping[str, Callable[..., Any]]] = {
    "_thnn_fused_lstm_cell": lambda gates, _, cell, *biases: (
        *(torch.empty_like(cell, memory_format=torch.contiguous_format) for _ in range(2)),
        torch.empty_like(gates, memory_format=torch.contiguous_format),
    ),
    "_thnn_fused_gru_cell": lambda gates, _, hidden, *biases: (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        hidden.new_empty(hidden.shape[0], 5 * hidden.shape[1]),
    ),
    "_thnn_fused_gru_cell_backward": lambda grad, workspace, has_biases: (
        *(grad.new_empty(grad.shape[0], 3 * grad.shape[1]) for _ in range(2)),
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        *(grad.new_empty(3 * grad.shape[1]) if has_biases else None for _ in range(2)),
    ),
}


def _padded_operator(name: str, is_one_kernel: bool, note: Callable[[str], None]) -> Callable[..., Any]:
    """Return the operator of a padded batch, with the arguments of ``torch.lstm`` or ``torch.gru``. ``name``,
    ``is_one_kernel`` and ``note`` are as in `_packed_operator`."""

    def network(input: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:  # noqa: A002
        hidden, weights, has_biases, layers, dropout, train, bidirectional, batch_first = arguments
        states = tuple(hidden) if name == _LSTM else (hidden,)
        steps = input.transpose(0, 1) if batch_first else input
        if is_one_kernel and _is_supported(input):
            output, *ends = _one_kernel(name, layers, dropout, train, steps, states, weights, note)
        else:
            rate, run = dropout if train else 0.0, functools.partial(_run_steps, name, has_biases)
            output, *ends = _step_by_step(run, layers, rate, bidirectional, steps, states, weights)
        return (output.transpose(0, 1) if batch_first else output, *ends)

    return network


def _packed_operator(name: str, is_one_kernel: bool, note: Callable[[str], None]) -> Callable[..., Any]:
    """Return the operator of packed sequences, with the arguments of ``torch.lstm`` or ``torch.gru`` for
    these. ``is_one_kernel``: whether the device has one kernel for the whole network; where `_is_supported`
    says no, the network runs cell by cell all the same. ``name``: a key of `_KEPT`; ``note``: as in
    `recurrent_kernels`."""

    def network(data: torch.Tensor, batch_sizes: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        hidden, weights, has_biases, layers, dropout, train, bidirectional = arguments
        states = tuple(hidden) if name == _LSTM else (hidden,)
        if is_one_kernel and _is_supported(data):
            return _one_kernel(name, layers, dropout, train, data, states, weights, note)
        rate, run = dropout if train else 0.0, functools.partial(_run_packed, name, has_biases, batch_sizes)
        return _step_by_step(run, layers, rate, bidirectional, data, states, weights)

    return network


def _is_supported(tensor: torch.Tensor) -> bool:
    return torch.backends.cudnn.enabled and tensor.dtype in _DTYPES


# -- step by step ------------------------------------------------------------------------------------------


def _step_by_step(
    run: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
    layers: int,
    dropout: float,
    bidirectional: bool,
    layer_input: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Return (the output, *the last states) of a network, cell by cell. ``run``: `_run_steps` or
    `_run_packed`, which runs one direction of a layer. ``layer_input``: (steps, batch, features), or (samples
    of all steps, features). ``states``: the initial ones, one or two tensors (layers x directions, batch,
    hidden size). ``weights``: those of all layers and directions, one after the other. ``dropout``: its rate
    between layers."""
    directions = 2 if bidirectional else 1
    count = len(weights) // (layers * directions)
    first = list(zip(*(state.unbind(0) for state in states), strict=True))
    ends: list[tuple[torch.Tensor, ...]] = []
    for layer in range(layers):
        # Both directions share the views of the steps, and so the sums of their gradients.
        steps, outputs = layer_input.unbind(0) if layer_input.dim() == 3 else layer_input, []
        for direction in range(directions):
            index = layer * directions + direction
            own = weights[index * count : (index + 1) * count]
            output, end = run(steps, first[index], own, bool(direction))
            outputs.append(output)
            ends.append(end)
        layer_input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and layer < layers - 1:
            layer_input = functional.dropout(layer_input, dropout)
    return layer_input, *(torch.stack(end) for end in zip(*ends, strict=True))


def _run_steps(
    name: str,
    has_biases: bool,
    steps: Sequence[torch.Tensor],
    hidden: tuple[torch.Tensor, ...],
    weights: Sequence[torch.Tensor],
    is_reversed: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the outputs (steps, batch, hidden size) and the last states of one direction of a layer.
    ``hidden``: the initial states. ``is_reversed``: whether it runs from the last step to the first.
    ``name``, ``has_biases`` and ``weights``: as in `_cell`."""
    outputs = []
    for step in reversed(steps) if is_reversed else steps:
        hidden = _cell(name, step, hidden, weights, has_biases)
        outputs.append(hidden[0])
    return torch.stack(outputs[::-1] if is_reversed else outputs), hidden


def _run_packed(
    name: str,
    has_biases: bool,
    batch_sizes: torch.Tensor,
    data: torch.Tensor,
    first: tuple[torch.Tensor, ...],
    weights: Sequence[torch.Tensor],
    is_reversed: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the outputs (samples of all steps, hidden size) and the last states of one direction of a layer
    on packed sequences. ``data`` (samples of all steps, features) has, step after step, one row for each
    sequence that has this step. ``batch_sizes``: their number in each step. ``first``: the initial states.
    The other arguments are as in `_run_steps`."""
    sizes = batch_sizes.tolist()
    starts = [0, *itertools.accumulate(sizes[:-1])]
    order = list(zip(starts, sizes, strict=True))[:: -1 if is_reversed else 1]
    size_before = order[0][1]
    hidden = tuple(h.narrow(0, 0, size_before) for h in first) if is_reversed else first
    outputs, ends = [], []
    for start, size in order:
        if size > size_before:  # samples begin, at their end
            begun = [h.narrow(0, size_before, size - size_before) for h in first]
            hidden = tuple(torch.cat(pair) for pair in zip(hidden, begun, strict=True))
        step = data.narrow(0, start, size)
        if size < size_before:  # samples end
            ends.append([h.narrow(0, size, size_before - size) for h in hidden])
            hidden = tuple(h.narrow(0, 0, size) for h in hidden)
        size_before = size
        hidden = _cell(name, step, hidden, weights, has_biases)
        outputs.append(hidden[0])
    if not is_reversed:
        hidden = tuple(torch.cat(end) for end in zip(*[*ends, hidden][::-1], strict=True))
    return torch.cat(outputs[::-1] if is_reversed else outputs), hidden


def _cell(
    name: str,
    step: torch.Tensor,
    hidden: tuple[torch.Tensor, ...],
    weights: Sequence[torch.Tensor],
    has_biases: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the states after ``step`` (batch, features): (hidden state, cell state) of an LSTM, else (hidden
    state,). ``name``: a key of `_KEPT`. ``weights``: of the input, of the hidden state, with ``has_biases``
    their two biases and, of an LSTM with projections, that of the projection."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    if name.startswith("rnn"):
        gates = functional.linear(hidden[0], w_hh, b_hh).add_(functional.linear(step, w_ih, b_ih))
        return (torch.tanh(gates) if name == "rnn_tanh" else torch.relu(gates),)
    products = step @ w_ih.t(), hidden[0] @ w_hh.t()
    if name != _LSTM:
        return (_ATEN._thnn_fused_gru_cell(*products, hidden[0], b_ih, b_hh)[0],)
    out, cell, _ = _ATEN._thnn_fused_lstm_cell(*products, hidden[1], b_ih, b_hh)
    has_projection = len(rest) > (2 if has_biases else 0)
    return out @ rest[-1].t() if has_projection else out, cell


def _lstm_cell(
    input: torch.Tensor,  # noqa: A002 - torch's own name
    hx: Sequence[torch.Tensor],
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    return _cell(_LSTM, input, tuple(hx), weights, b_ih is not None)


def _gru_cell(
    input: torch.Tensor,  # noqa: A002 - torch's own name
    hx: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    return _cell("gru", input, (hx,), weights, b_ih is not None)[0]


# -- one kernel --------------------------------------------------------------------------------------------


def _one_kernel(
    name: str,
    layers: int,
    dropout: float,
    train: bool,
    steps: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    weights: Sequence[torch.Tensor],
    note: Callable[[str], None],
) -> tuple[torch.Tensor, ...]:
    """Return (the output, *the last states) of a network that runs as one kernel. ``name``: a key of `_KEPT`.
    ``steps``: (steps, batch, features), or (samples of all steps, features). ``states``, ``weights`` and
    ``dropout``: as in `_step_by_step`. Autocast casts all tensors but float64 ones. If ``train``,
    `_kept_bytes` are kept for backward, and ``note`` is called with `UNKNOWN_BUFFER`."""
    tensors = [steps, *states, *weights]
    if torch.is_autocast_enabled(HOST):
        dtype = torch.get_autocast_dtype(HOST)
        tensors = [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    kept_bytes = 0
    if train:
        note(UNKNOWN_BUFFER)
        kept_bytes = _kept_bytes(name, layers, dropout, tensors[0], states)
    output_size = states[0].shape[0] // layers * states[0].shape[-1]
    return _Network.apply(  # type: ignore[no-any-return,no-untyped-call]
        kept_bytes, output_size, len(states), *tensors
    )


def _kept_bytes(
    name: str, layers: int, dropout: float, steps: torch.Tensor, states: tuple[torch.Tensor, ...]
) -> int:
    """Return the bytes that a network keeps for backward besides its arguments and its output, at least: for
    each layer and direction `_KEPT` and, of an LSTM with projections, what is projected; the outputs of all
    layers but the last, and one byte for each of their elements if there is dropout between layers. The
    arguments are as in `_one_kernel`."""
    networks, out, units = states[0].shape[0], states[0].shape[-1], states[-1].shape[-1]
    per_row = networks * units * (_KEPT[name] + (out != units)) * steps.element_size()
    inner = networks // layers * (layers - 1) * out * (steps.element_size() + bool(dropout))
    return steps.shape[:-1].numel() * (per_row + inner)


class _Network(torch.autograd.Function):
    """Autograd function: a whole network in one kernel, as cuDNN runs it
    (aten/src/ATen/native/cudnn/RNN.cpp). It keeps its arguments, its output and a buffer of ``kept_bytes``
    for backward. The gradients of all weights are parts of one tensor. It computes no values: it only
    allocates what the kernel allocates and reports its work."""

    @staticmethod
    def forward(
        ctx: Any, kept_bytes: int, output_size: int, states: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        steps, first, weights = tensors[0], tensors[1 : 1 + states], tensors[1 + states :]
        read = steps.contiguous()
        output = steps.new_empty(*steps.shape[:-1], output_size)
        ends = [torch.empty_like(state, memory_format=torch.contiguous_format) for state in first]
        buffer = steps.new_empty(kept_bytes, dtype=torch.uint8)
        ctx.flops = 2 * steps.shape[:-1].numel() * sum(w.numel() for w in weights if w.dim() == 2)
        dtype = dtype_name(steps.dtype)
        kernel([output, *ends, buffer], read_bytes([read, *tensors[1:]]), flops=ctx.flops, dtype=dtype)
        ctx.save_for_backward(output, buffer, *tensors)
        ctx.states = states
        return output, *ends

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        output, buffer, steps, *rest = ctx.saved_tensors
        weights = rest[ctx.states :]
        read = [steps.contiguous(), grads[0].contiguous()]
        results = [torch.empty_like(read[0]), *map(torch.empty_like, rest[: ctx.states])]
        flat = steps.new_empty(sum(w.numel() for w in weights))
        dtype = dtype_name(steps.dtype)
        reads = read_bytes([*read, output, buffer, *grads[1:], *rest])
        kernel([*results, flat], reads, flops=2 * ctx.flops, dtype=dtype)
        parts = flat.split([w.numel() for w in weights])
        return None, None, None, *results, *(p.view(w.shape) for p, w in zip(parts, weights, strict=True))
