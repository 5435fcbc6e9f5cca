"""Choose the kernels of the target device while all tensors are fake CPU tensors.

What a device chooses follows from its `DeviceKind`. For CUDA:

- Attention uses the flash kernel (half precision, no mask, a head dim of at most 256) or else the
  memory-efficient kernel, as torch's own dispatcher chooses
  (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
- Dropout keeps a mask of one byte per element (``native_dropout``). The CPU keeps a mask of the input's
  dtype.
- Under autocast, the functions in CUDA's float32 list run in float32 (aten/src/ATen/autocast_mode.h). The CPU
  has a different list, which leaves most of them in half precision.
- ``softmax(dtype=float32)`` of a float16 tensor is one kernel and makes no float32 copy of its input. Of a
  bfloat16 tensor it makes one (``softmax`` in aten/src/ATen/native/SoftMax.cpp).
- Layer normalisation keeps its statistics in float32.

On every accelerator, a layer of an LSTM is one kernel. Torch chooses it for CPU tensors by their dtype and by
the instructions of this machine's processor; the trace must depend on neither.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from memfit.trace.autograd_patches import plain_formulas
from memfit.trace.evoformer_kernel import trace_evoformer_attention
from memfit.types.device_kind import CUDA, HOST, DeviceKind, device_kind

_HALF = (torch.float16, torch.bfloat16)
_LSTM_MODE = 2  # among torch's recurrent networks


class DeviceKernelMode(TorchFunctionMode):
    """Mode that redirects calls of torch functions on fake CPU tensors to the kernels that a device of this
    kind would run: attention, dropout, softmax, log_softmax and, under autocast, the functions that its
    autocast runs in float32."""

    def __init__(self, kind: DeviceKind) -> None:
        super().__init__()
        self._replacements: dict[Any, Callable[..., Any]] = {torch.lstm: _lstm}
        if kind.kernels == "cuda":
            self._replacements |= _ATTENTION | _softmax_kernels(half_to_float=True)
        elif kind.autocast == "cuda":
            self._replacements |= _softmax_kernels(half_to_float=False)
        if kind.fused_dropout:
            self._replacements |= _DROPOUT
        self._in_float32 = _IN_FLOAT32 if kind.autocast == "cuda" else frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = self._replacements.get(func)
        if replacement is not None:
            return replacement(*args, **kwargs)
        if func in self._in_float32 and torch.is_autocast_enabled("cpu"):
            return _widened(func, args, kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def use_device_kernels(device: str) -> Iterator[None]:
    """Inside this context, patch the derivatives that differ for fake tensors (`plain_formulas`) and, unless
    ``device`` is "cpu", use `DeviceKernelMode` in forward and in what backward recomputes, and let autocast
    that the model enters for the device (`autocast_on_host`) be that of the host. Torch disables function
    modes before its autograd engine runs, so the mode is entered again there. For "cuda", also replace the
    kernels of DeepSpeed's attention for Evoformers (`trace_evoformer_attention`)."""
    if (kind := device_kind(device)).is_host:
        with plain_formulas():
            yield
        return
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    mode = DeviceKernelMode(kind)

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return engine(*args, **kwargs)

    evoformer = trace_evoformer_attention() if kind.name == CUDA else contextlib.nullcontext()
    patch = mock.patch.object(torch.autograd, "_engine_run_backward", run_in_mode)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in autocast_on_host(lambda d: torch.device(d).type == kind.name):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for context in (plain_formulas(), mode, evoformer, patch):
            stack.enter_context(context)
        yield


def autocast_on_host(names_device: Callable[[Any], bool]) -> list[tuple[Any, str, Any]]:
    """Return patches (owner, name, replacement) by which autocast for a device that ``names_device`` accepts
    is autocast of the host, with the device's default dtype. Without them torch disables autocast for a
    device that this machine lacks."""
    autocast_init = torch.amp.autocast_mode.autocast.__init__

    @functools.wraps(autocast_init)
    def init(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if names_device(device_type):
            dtype = dtype or torch.get_autocast_dtype(device_type)
            device_type = HOST
        autocast_init(self, device_type, dtype, *args, **kwargs)

    def of_host(inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device=CUDA, *rest: inner(HOST if names_device(device) else device, *rest)

    return [
        (torch.amp.autocast_mode.autocast, "__init__", init),
        (torch, "is_autocast_enabled", of_host(torch.is_autocast_enabled)),
        (torch, "get_autocast_dtype", of_host(torch.get_autocast_dtype)),
        # the deprecated name, which torchao calls; torch warns of it
        (torch, "get_autocast_gpu_dtype", of_host(torch.get_autocast_dtype)),
    ]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return the scaled dot-product attention of tensors of the shape (batch, heads, length, head dim). It
    runs the flash kernel for half precision (float16 or bfloat16), no mask and a head dim of at most 256,
    else the memory-efficient one. Autocast casts the tensors before this choice. With ``enable_gqa``, heads
    of keys and values are repeated."""
    aten: Any = torch.ops.aten
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return out[0]  # type: ignore[no-any-return]
    bias = _bias(attn_mask, query, key)
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )
    return out[0]  # type: ignore[no-any-return]


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return the mask that is added to the scores, in their shape (batch, heads, queries, keys), or None
    without a mask. A boolean mask becomes one of the query's dtype with 0 for True and -inf for False, as the
    kernel's caller in torch does it."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _dropout(
    input: torch.Tensor,  # noqa: A002 - torch's own name
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    if not training or p == 0.0 or inplace or not input.requires_grad:
        return functional.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _lstm(input: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: A002
    """Return (output, last hidden states, last cell states) of an LSTM, with the arguments of ``torch.lstm``.
    Each layer and direction is one kernel, as torch's own implementation calls it on a CPU in float32
    (aten/src/ATen/native/mkldnn/RNN.cpp). LSTMs of packed sequences, of complex numbers or with projections
    are left to torch."""
    is_packed = isinstance(args[0], torch.Tensor)
    directions = 2 if args[-2] is True else 1
    if is_packed or len(args[1]) != (4 if args[2] else 2) * args[3] * directions or input.is_complex():
        return torch.lstm(input, *args)
    (hidden, cell), weights, has_biases, layers, dropout, train, bidirectional, batch_first = args
    count = len(weights) // (layers * directions)
    states = hidden.contiguous(), cell.contiguous()
    hidden_size = hidden.shape[-1]
    layer_input = (input.transpose(0, 1) if batch_first else input).contiguous()
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = [*weights[index * count : (index + 1) * count]]
            own += [torch.zeros_like(own[0][:, 0]) for _ in range(4 - count)]  # without biases
            output, *end, _ = torch.ops.aten.mkldnn_rnn_layer(
                layer_input,
                *own,
                *(state[index] for state in states),
                direction > 0,
                [],
                _LSTM_MODE,
                hidden_size,
                layers,
                has_biases,
                bidirectional,
                batch_first,
                train,
            )
            outputs.append(output)
            ends.append((end[0], end[1]))
        layer_input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and train and layer < layers - 1:
            layer_input = functional.dropout(layer_input, dropout)
    last_hidden, last_cell = (torch.stack([end[i] for end in ends]) for i in range(2))
    return layer_input.transpose(0, 1) if batch_first else layer_input, last_hidden, last_cell


def _softmax(
    kernel: Callable[..., torch.Tensor] | None, whole: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Return the result of ``whole``, torch's softmax or log_softmax. Under autocast its dtype is float32
    unless the caller gives one. ``kernel``: one that goes from float16 to float32, or None. With one, for a
    float16 tensor, the dtype float32 and a given dim, run it instead, which makes no float32 copy of the
    input."""
    tensor, dim, dtype = _softmax_arguments(*args, **kwargs)
    if torch.is_autocast_enabled("cpu"):
        dtype = dtype or torch.float32
    if kernel is not None and tensor.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
        if kernel is torch._softmax:
            return torch._softmax(tensor, dim, True)
        return _HalfToFloat.apply(tensor)  # type: ignore[no-any-return,no-untyped-call]
    return whole(tensor, dim, dtype=dtype)


def _softmax_arguments(
    input: torch.Tensor,  # noqa: A002 - torch's own name
    dim: int | None = None,
    _stacklevel: int | torch.dtype | None = None,  # torch.softmax takes the dtype in this position
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, int | None, torch.dtype | None]:
    return input, dim, _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype


class _HalfToFloat(torch.autograd.Function):
    """Autograd function: log_softmax of a half-precision tensor in float32. It saves its output, and the
    input's gradient is in half precision. It computes no values: it only allocates what the kernels allocate
    and notes the bytes that they read."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(tensor, dtype=torch.float32)
        kernel([out], read_bytes([tensor]))
        ctx.save_for_backward(out)
        ctx.dtype = tensor.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (out,) = ctx.saved_tensors
        grad = torch.empty_like(out, dtype=ctx.dtype)
        kernel([grad], read_bytes([out, *grads]))
        return grad


def _widened(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return the result of the call in float32: half-precision tensors among the arguments, also in lists,
    are cast, and autocast is disabled."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in _HALF:
            return value.float()
        return type(value)(wide(v) for v in value) if isinstance(value, list | tuple) else value

    with torch.autocast("cpu", enabled=False):
        return func(*(wide(a) for a in args), **{k: wide(v) for k, v in kwargs.items()})


_ATTENTION: dict[Any, Callable[..., Any]] = {functional.scaled_dot_product_attention: _attention}
_DROPOUT: dict[Any, Callable[..., Any]] = {functional.dropout: _dropout}


def _softmax_kernels(*, half_to_float: bool) -> dict[Any, Callable[..., Any]]:
    """Return torch's functions of softmax and log_softmax -> what replaces them. ``half_to_float``: the
    device's kernels read float16 and write float32."""
    softmax = functools.partial(_softmax, torch._softmax if half_to_float else None, torch.softmax)
    log_softmax = functools.partial(
        _softmax, torch._log_softmax if half_to_float else None, torch.log_softmax
    )
    return {
        **dict.fromkeys((functional.softmax, torch.softmax, torch.Tensor.softmax), softmax),
        **dict.fromkeys((functional.log_softmax, torch.log_softmax, torch.Tensor.log_softmax), log_softmax),
    }


_NAMES = (
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow",
    "norm",
    "cumprod",
    "cumsum",
    "dist",
    "renorm",
    "logsumexp",
    "prod",
    "sum",
)
_FUNCTIONS = (
    "layer_norm",
    "group_norm",
    "rms_norm",
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "kl_div",
    "cosine_similarity",
    "cosine_embedding_loss",
    "poisson_nll_loss",
    "hinge_embedding_loss",
    "margin_ranking_loss",
    "multi_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multilabel_margin_loss",
    "gaussian_nll_loss",
    "softplus",
    "softmin",
    "binary_cross_entropy_with_logits",
)
_IN_FLOAT32 = frozenset(
    getattr(home, name)
    for home, names in ((torch, _NAMES), (torch.Tensor, _NAMES), (functional, _FUNCTIONS))
    for name in names
    if hasattr(home, name)
) | frozenset({torch.layer_norm, torch.group_norm, torch.rms_norm, torch.Tensor.__pow__})
