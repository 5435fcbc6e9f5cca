"""Properties of plain tensors that fake ones lack: the dtypes and strides that real kernels return, and
reference counts. And a clear error for tensors that are neither dense nor sparse COO."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._prims_common import (
    make_channels_last_strides_for,
    make_contiguous_strides_for,
    suggest_memory_format,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.trace import operators
from memfit.trace.source_location import user_line
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError


def correct_norm_outputs(func: Any, args: Any, out: Any, device: str) -> Any:
    """Return ``out``, the fake outputs of a normalisation (layer, group or batch norm, forward or backward),
    corrected to what the real kernels return.

    The fake implementations return all outputs, in one dtype. Forward: for half-precision inputs, the
    statistics (means and deviations) become float32 on CUDA, except those of group norm. On every device they
    do if a weight, bias or running statistic is float32 (is_mixed_type in
    aten/src/ATen/native/cpu/mixed_data_type.h). Backward: the input's gradient gets the input's dtype, or
    becomes None if it is not requested. On the CPU, the first output gets the strides that the kernel gives
    it (`_kernel_strides`).
    """
    is_backward = func in operators.NORM_GRADIENTS
    x, first, statistics = args[int(is_backward)], out[0], out[1:]
    if is_backward:
        has_dtype = first is not None and first.dtype == x.dtype
        first = (first if has_dtype else torch.empty_like(x)) if args[-1][0] else None
    else:
        is_mixed = any(isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args[1:5])
        is_wide = is_mixed or (device_kind(device).kernels == "cuda" and func is not operators.GROUP_NORM)
        if is_wide and x.element_size() == 2:
            statistics = tuple(torch.empty_like(s, dtype=torch.float32) for s in statistics)
    if first is not None and device_kind(device).is_host:
        strides = _kernel_strides(func, args[0], x)
        if first.stride() != strides:
            first = first.new_empty_strided(first.shape, strides)
    return (first, *statistics)


def _kernel_strides(func: Any, grad: torch.Tensor, x: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of what a normalisation's CPU kernel makes of its input ``x``: its output, or in
    backward the gradient of ``x``. ``grad``: the gradient of the output, in forward ``x`` again.

    Layer norm makes contiguous tensors, batch norm and group norm contiguous or channels-last ones, as the
    strides of ``x`` suggest. Images of one pixel are both; of these, batch norm makes contiguous ones, unless
    the gradient's strides suggest another layout than those of ``x`` (aten/src/ATen/native: layer_norm.cpp,
    group_norm.cpp, Normalization.cpp). The next operators choose their kernels, and with these their
    workspaces, by the strides.
    """
    layout = torch.contiguous_format if func in operators.LAYER_NORMS else suggest_memory_format(x)
    if func in operators.BATCH_NORMS and x.is_contiguous() and suggest_memory_format(grad) is layout:
        layout = torch.contiguous_format
    is_contiguous = layout is torch.contiguous_format
    return make_contiguous_strides_for(x.shape) if is_contiguous else make_channels_last_strides_for(x.shape)


def strided_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Return the storage of a dense (strided) tensor. Raises UserError for every other layout, whose bytes
    are not in one storage, also for sparse COO: callers must handle such tensors before."""
    if tensor.layout is torch.strided:
        return tensor.untyped_storage()
    line = user_line()
    raise UserError(
        f"the step makes a {str(tensor.layout)[6:]} tensor" + (f" at {line}" if line else ""),
        allowed="dense (strided) and sparse_coo tensors",
        hint="make the tensor in one of these layouts",
    )


@functools.cache
def sole_counts() -> tuple[int, int]:
    """Return (references to a tensor, references to its storage), as a dispatch mode counts them when only
    the autograd engine holds the tensor. They are measured once per process on ``x * x``, where two gradients
    of ``x`` are added."""
    counts: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is operators.ADD:
                storage = args[0].untyped_storage()
                counts.append((args[0]._use_count(), torch._C._storage_Use_Count(storage._cdata)))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.enable_grad(), Watch():  # type: ignore[no-untyped-call]
        root = torch.ones(2, requires_grad=True).sin()
        (root * root).sum().backward()
    return counts[0]
