"""Autocast of a device while all tensors are on the host.

Autocast casts the arguments of operators by lists, and each device has its own lists
(aten/src/ATen/autocast_mode.h and autocast_mode.cpp). Torch applies the lists of the host to tensors of the
host. Here they are replaced, in torch's dispatcher, by those of CUDA. Calls that other operators make are
cast too, as those of ``log_softmax`` in ``cross_entropy``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import torch
from torch.utils import _pytree
from torch.utils.weak import WeakIdRef

from memfit.trace.kernel_registration import aten_operator, replace_kernels
from memfit.types.errors import UserError

_HALF: Final = (torch.float16, torch.bfloat16)


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in text.split())


# What CUDA's autocast does with the operators that torch has registered for it: run them in the lower
# precision, let their result be float32 unless the caller gives a dtype, run them in the widest dtype of
# their arguments, or refuse them. It runs all others in float32.
_LOWER_PRECISION: Final = _names(
    """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution
    cudnn_convolution_transpose prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm
    baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell
    gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
    scaled_dot_product_attention
    """
)
_FLOAT32_RESULT: Final = _names(
    """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
    """
)
_FLOAT32_RESULT_OF: Final = {  # an operator that takes a dtype instead
    "aten::norm.Scalar": "aten::norm.ScalarOpt_dtype",
    "aten::norm.ScalarOpt_dim": "aten::norm.ScalarOpt_dim_dtype",
}
_WIDEST: Final = _names(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
    """
)
_REFUSED: Final = frozenset({"aten::binary_cross_entropy"})


@contextlib.contextmanager
def cuda_autocast_on_host(device: str = "") -> Iterator[None]:
    """Inside this context, autocast casts tensors of the host as CUDA's autocast casts those of a GPU. As
    torch does, it casts a weight to the lower precision once for all operators, until the outermost autocast
    ends (``cached_cast`` in autocast_mode.cpp). If torch's autocast for the kind ``device`` refuses
    binary_cross_entropy, as that for "cuda" does, a call of it under autocast raises UserError; with "" none
    is refused."""
    cuda, host = (_registered(key) for key in ("AutocastCUDA", "AutocastCPU"))
    refused = frozenset[str]()
    with contextlib.suppress(RuntimeError):  # torch knows no lists for this kind
        refused = _REFUSED & _registered(f"Autocast{device.upper()}")
    casts: dict[WeakIdRef, torch.Tensor] = {}
    clear_of_torch = torch.clear_autocast_cache

    def clear() -> None:
        casts.clear()
        clear_of_torch()

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear))
        stack.callback(casts.clear)
        unlisted = [(name, "AutocastCPU", torch.library.fallthrough_kernel) for name in host - cuda]
        listed = [(name, "AutocastCPU", _kernel(name, casts)) for name in cuda - _REFUSED]
        refusing = [(name, "AutocastCPU", _refuse) for name in refused]
        stack.enter_context(replace_kernels([*unlisted, *listed, *refusing]))
        yield


def _registered(key: str) -> set[str]:
    """Return the names, such as "aten::mm", of torch's own operators that have a kernel for the dispatch key
    ``key``. Operators that libraries such as torchvision add are left out."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name for name in names if name.startswith("aten::")}


def _kernel(name: str, casts: dict[WeakIdRef, torch.Tensor]) -> Callable[..., Any]:
    operator = aten_operator(name)
    if name in _FLOAT32_RESULT_OF:
        return functools.partial(_with_dtype, operator, aten_operator(_FLOAT32_RESULT_OF[name]))
    if name in _FLOAT32_RESULT:
        return functools.partial(_to_float32_result, operator)
    if name in _WIDEST:
        return functools.partial(_in_widest, operator)
    if name in _LOWER_PRECISION:
        return functools.partial(_in_lower_precision, operator, casts)
    return functools.partial(_in_float32, operator)


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _run(
    operator: Any,
    dtype: torch.dtype,
    args: Any,
    kwargs: Any,
    casts: dict[WeakIdRef, torch.Tensor] | None = None,
) -> Any:
    """Return the operator's result, without autocast, for its arguments in ``dtype``. Tensors of float16,
    bfloat16 and float32 are cast, the last argument first, as in torch's builds. ``casts``: the kept casts of
    weights (float32 leaves that require gradients), which are reused and added to; None: none are kept."""

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype not in (*_HALF, torch.float32):
            return value
        is_weight = value.dtype == torch.float32 and value.requires_grad and value.is_leaf
        if casts is None or not is_weight or value._is_view() or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if (kept := casts.get(weight := WeakIdRef(value))) is None:
            with torch.enable_grad():
                kept = casts[weight] = value.to(dtype)
        return kept

    with _without_autocast():
        kwargs = {name: _pytree.tree_map(cast, kwargs[name]) for name in reversed(kwargs)}
        args = [_pytree.tree_map(cast, arg) for arg in reversed(args)][::-1]
        return operator(*args, **kwargs)


def _in_lower_precision(
    operator: Any, casts: dict[WeakIdRef, torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    return _run(operator, torch.get_autocast_dtype("cpu"), args, kwargs, casts)


def _in_float32(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(operator, torch.float32, args, kwargs)


def _to_float32_result(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the operator's result, computed with ``dtype=float32`` if no dtype is given and the first
    argument is float16, bfloat16 or float32. The argument itself is not cast."""
    names = [argument.name for argument in operator._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    with _without_autocast():
        if args[0].dtype in (*_HALF, torch.float32) and values.get("dtype") is None:
            values["dtype"] = torch.float32
        first = [
            values.pop(a.name) for a in operator._schema.arguments if a.name in values and not a.kwarg_only
        ]
        return operator(*first, **values)


def _with_dtype(operator: Any, typed: Any, *args: Any, **kwargs: Any) -> Any:
    with _without_autocast():
        if args[0].dtype not in _HALF:
            return operator(*args, **kwargs)
        defaults = [a.default_value for a in operator._schema.arguments]
        return typed(*args, *defaults[len(args) :], **kwargs, dtype=torch.float32)


def _refuse(*_: Any, **__: Any) -> Any:
    raise UserError(
        "binary_cross_entropy is called under autocast, where torch refuses it on a GPU, because rounded "
        "inputs may be 0 or 1",
        allowed="binary_cross_entropy_with_logits of the values before the sigmoid; or "
        "binary_cross_entropy of float32 values with autocast disabled around it",
    )


def _in_widest(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the operator's result in float32 if one of its tensors is float32, else in autocast's dtype."""
    dtypes = {t.dtype for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    dtype = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cpu")
    return _run(operator, dtype, args, kwargs)
