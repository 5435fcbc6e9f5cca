"""Choose the kernels of the target device while all tensors are fake CPU tensors.

What a device chooses follows from its `DeviceKind`. The choices are made in torch's dispatcher, so that they
also hold for calls inside torch's own modules and functions. For CUDA:

- Attention uses the kernel that torch's own dispatcher chooses by the device's compute capability
  (`attention_kernel_of`).
- Dropout keeps a mask of one byte per element (``native_dropout``). The CPU keeps a mask of the input's
  dtype.
- Autocast follows CUDA's lists (`cuda_autocast_on_host`).
- ``softmax(dtype=float32)`` of a float16 tensor is one kernel and makes no float32 copy of its input. Of a
  bfloat16 tensor it makes one (``softmax`` in aten/src/ATen/native/SoftMax.cpp).
- ``rms_norm`` is one kernel.
- Layer normalisation keeps its statistics in float32.

For every accelerator, recurrent networks run as `recurrent_kernels` says. Torch chooses their kernels for CPU
tensors by their dtype and by the instructions of this machine's processor; the trace must depend on neither.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from memfit.trace.attention_kernels import attention_kernel_of
from memfit.trace.autograd_patches import patch_formulas
from memfit.trace.device_autocast import cuda_autocast_on_host
from memfit.trace.evoformer_kernel import trace_evoformer_attention
from memfit.trace.kernel_registration import replace_kernels
from memfit.trace.recurrent_kernels import CELLS_ON_FAKES, recurrent_kernels
from memfit.types.device_kind import CUDA, HOST, DeviceKind, device_kind

_ATEN: Any = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def use_device_kernels(device: str, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Inside this context, run for fake tensors on the CPU the kernels that ``device`` would run. ``device``
    is a name such as "cuda" (`device_kind`).

    Derivatives that differ for fake tensors are patched for every device (`patch_formulas`), and nothing else
    is for "cpu". For another device, autocast for it acts on the host (`autocast_on_host`), by CUDA's lists
    if the device uses these (`cuda_autocast_on_host`, which refuses some calls). For "cuda", DeepSpeed's
    attention for Evoformers is replaced, too (`trace_evoformer_attention`). ``note`` is called with a
    sentence about each kernel that runs and whose choice or memory is not known.
    """
    if (kind := device_kind(device)).is_host:
        with patch_formulas():
            yield
        return
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in autocast_on_host(lambda d: torch.device(d).type == kind.name):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for context in (patch_formulas(), _kernels_of(kind, note)):
            stack.enter_context(context)
        if kind.autocast == "cuda":
            stack.enter_context(cuda_autocast_on_host(kind.name))
        if kind.name == CUDA:
            stack.enter_context(trace_evoformer_attention())
        yield


@contextlib.contextmanager
def _kernels_of(kind: DeviceKind, note: Callable[[str], None]) -> Iterator[None]:
    kernels = dict(recurrent_kernels(kind, note))
    if kind.kernels == "cuda":
        kernels |= {
            "scaled_dot_product_attention": attention_kernel_of(kind, note),
            "softmax.int": _softmax,
            "log_softmax.int": _log_softmax,
        }
    if kind.name == CUDA:
        kernels["rms_norm"] = _rms_norm
    if kind.fused_dropout:
        kernels["dropout"] = _dropout
    keys = ("AutogradCPU", "CPU")
    replaced = [(name, key, function) for name, function in kernels.items() for key in keys]
    cells = [(name, "Meta", function) for name, function in CELLS_ON_FAKES.items()]
    with replace_kernels([*replaced, *cells]):
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


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: A002 - torch's own name
    if not train or not 0.0 < p < 1.0 or not input.numel():
        return _ATEN.dropout.default.decompose(input, p, train)  # type: ignore[no-any-return]
    return torch.native_dropout(input, p, True)[0]


def _rms_norm(
    input: torch.Tensor,  # noqa: A002 - torch's own name
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    if weight is not None and weight.dtype != input.dtype:  # torch's kernel takes one dtype
        return _ATEN.rms_norm.default.decompose(input, normalized_shape, weight, eps)  # type: ignore[no-any-return]
    return _RmsNorm.apply(input, weight, len(normalized_shape))  # type: ignore[no-any-return,no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """Autograd function: rms_norm over the last ``dims`` dimensions in one kernel (``_fused_rms_norm``). It
    saves the input, the weight and one scale for each normalised slice. It computes no values: it only
    allocates what the kernels allocate and notes the bytes that they read."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weight: torch.Tensor | None, dims: int) -> torch.Tensor:
        out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        shape = (*tensor.shape[:-dims], *[1] * dims)
        scale = tensor.new_empty(shape, dtype=torch.float32 if tensor.dtype in _HALF else tensor.dtype)
        kernel([out, scale], read_bytes([t for t in (tensor, weight) if t is not None]))
        ctx.save_for_backward(tensor, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        tensor, weight, scale = ctx.saved_tensors
        needed = zip((tensor, weight), ctx.needs_input_grad, strict=False)
        results = [torch.empty_like(t) if is_needed else None for t, is_needed in needed]
        read = read_bytes([t for t in (tensor, weight, scale, *grads) if t is not None])
        kernel([t for t in results if t is not None], read)
        return *results, None


def _softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    if tensor.dtype == torch.float16 and dtype == torch.float32:
        return torch._softmax(tensor, dim, True)
    return _ATEN.softmax.int.decompose(tensor, dim, dtype)  # type: ignore[no-any-return]


def _log_softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    if tensor.dtype == torch.float16 and dtype == torch.float32:
        return _HalfToFloat.apply(tensor)  # type: ignore[no-any-return,no-untyped-call]
    return _ATEN.log_softmax.int.decompose(tensor, dim, dtype)  # type: ignore[no-any-return]


class _HalfToFloat(torch.autograd.Function):
    """Autograd function: log_softmax in float32 of a float16 tensor. It saves its output, and the gradient of
    the input is float16. It computes no values: it only allocates what the kernels allocate and notes the
    bytes that they read."""

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
