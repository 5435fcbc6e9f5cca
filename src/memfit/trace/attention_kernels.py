"""Scaled dot-product attention of a target device, for tensors on the CPU.

On CUDA, torch runs the flash kernel, the memory-efficient one, cuDNN's or a composite of matrix products, by
the tensors and the compute capability of the device (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional

from memfit.types.device_kind import DeviceKind

_ATEN: Any = torch.ops.aten
_HALF: Final = (torch.float16, torch.bfloat16)
# From torch 2.15 on, fused kernels take tensors without a batch, and one head of keys and values for all
# queries; the memory-efficient one takes grouped heads, and on 8.0 and above no misaligned tensors.
_IS_2_15: Final = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
UNTESTED_ON_ROCM: Final = (
    "torch's rules for CUDA chose the kernels of attention; those for ROCm were not tested"
)
UNKNOWN_CAPABILITY: Final = (
    "the device's compute capability is not known; the kernels of attention are those of 8.0 and above"
)
MATH_FOR_CUDNN: Final = (
    "attention was predicted with matrix products; on this device torch may run cuDNN's kernel, which takes "
    "less memory"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The arguments of ``scaled_dot_product_attention`` that decide its kernel. ``query``, ``key`` and
    ``value`` have the shape (batch, heads, length, head dim). ``mask`` None: there is none."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(``query``, ``key``, ``value``)."""
        return self.query, self.key, self.value

    @property
    def is_half(self) -> bool:
        """Whether the queries are float16 or bfloat16."""
        return self.query.dtype in _HALF

    @property
    def has_unit_strides(self) -> bool:
        """Whether queries, keys and values have a stride of 1 in their last dimension."""
        return all(tensor.stride(-1) == 1 for tensor in self.tensors)

    def with_batch(self) -> AttentionCall:
        """Return the call with a batch dimension of 1 in front of queries, keys and values. A mask of fewer
        than four dimensions gets leading dimensions of 1 up to four."""
        mask = self.mask
        while mask is not None and mask.dim() < 4:
            mask = mask.unsqueeze(0)
        query, key, value = (tensor.unsqueeze(0) for tensor in self.tensors)
        return dataclasses.replace(self, query=query, key=key, value=value, mask=mask)


def attention_kernel_of(kind: DeviceKind, note: Callable[[str], None]) -> Callable[..., torch.Tensor]:
    """Return a function with the arguments of ``scaled_dot_product_attention`` that runs the kernel of
    devices of ``kind``. It calls ``note`` with a sentence if this choice may be wrong (`_unknown`), and
    raises what `choose_kernel` raises."""

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
        )
        batched = call.with_batch() if _IS_2_15 and all(t.dim() == 3 for t in call.tensors) else call
        chosen = choose_kernel(kind, batched)
        if unknown := _unknown(kind, batched, chosen):
            note(unknown)
        if batched is call or chosen == "math":
            return _KERNELS[chosen](call, scale)
        return _KERNELS[chosen](batched, scale).squeeze(0)

    return attention


def choose_kernel(kind: DeviceKind, call: AttentionCall) -> str:
    """Return "flash", "efficient", "math" or "cudnn": the kernel that torch chooses on devices of ``kind``. A
    kernel that the caller has disabled (``torch.nn.attention.sdpa_kernel``) is not chosen. cuDNN's comes
    last, as on most devices. An unknown compute capability counts as 8.0. If no enabled kernel takes the
    call, return "math" with an unknown capability, and with a known one raise RuntimeError, as torch does."""
    capability = kind.attention_since
    if fused := _fused_kernel(capability, call):
        return fused
    if torch.backends.cuda.math_sdp_enabled():
        return "math"
    if torch.backends.cuda.cudnn_sdp_enabled() and _cudnn_takes(capability, call):
        return "cudnn"
    if kind.compute_capability is None:
        return "math"
    raise RuntimeError("No available kernel. Aborting execution.")


def _fused_kernel(capability: tuple[int, int], call: AttentionCall) -> str:
    """Return "flash" or else "efficient" if that kernel is enabled and takes the call; "" if neither does."""
    if torch.backends.cuda.flash_sdp_enabled() and _flash_takes(capability, call):
        return "flash"
    if torch.backends.cuda.mem_efficient_sdp_enabled() and _efficient_takes(capability, call):
        return "efficient"
    return ""


def _shapes_fit(call: AttentionCall) -> bool:
    """Return whether the tensors have what all fused kernels need: four dimensions, one dtype, one batch
    size, lengths above 0, and a mask with consecutive elements in its last dimension."""
    query, key, value = call.tensors
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0] == value.shape[0]
        and 0 not in (query.shape[2], key.shape[2])
        and (call.mask is None or call.mask.stride(-1) == 1)
    )


def _heads_fit(call: AttentionCall, takes_groups: bool, takes_unequal: bool = False) -> bool:
    """Return whether a fused kernel takes the call's numbers of heads. It takes equal numbers and, from torch
    2.15 on, one head of keys and values for all queries. If it ``takes_groups`` and the call has
    ``enable_gqa``, the number for the queries may be a multiple of that of the keys and that of the values.
    These two must be equal unless it ``takes_unequal``."""
    queries, keys, values = (tensor.shape[1] for tensor in call.tensors)
    if call.enable_gqa and takes_groups:
        is_multiple = 0 not in (keys, values) and queries % keys == queries % values == 0
        return is_multiple and (keys == values or takes_unequal)
    return queries == keys == values or (_IS_2_15 and keys == values == 1 and queries > 0)


def _flash_takes(capability: tuple[int, int], call: AttentionCall) -> bool:
    """Return whether the flash kernel of devices of this compute capability takes the call. That of 8.6
    takes no call with gradients and a head dim of 193 to 224, nor of 225 to 256 with dropout."""
    size = call.query.shape[-1]
    if capability < (8, 0) or not call.is_half or call.mask is not None or not _shapes_fit(call):
        return False
    if not size == call.key.shape[-1] == call.value.shape[-1] <= 256:
        return False
    if not _heads_fit(call, takes_groups=True) or (
        call.is_causal and call.query.shape[2] != call.key.shape[2]
    ):
        return False
    if not (call.has_unit_strides or size == 1):
        return False
    is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors)
    return not (capability == (8, 6) and is_trained) or size <= 192 or (size > 224 and call.dropout_p == 0.0)


def _efficient_takes(capability: tuple[int, int], call: AttentionCall) -> bool:
    """Return whether the memory-efficient kernel of devices of this compute capability takes the
    call."""
    dtype, size = call.query.dtype, call.query.shape[-1]
    if dtype not in (*_HALF, torch.float32) or (dtype == torch.bfloat16 and capability < (8, 0)):
        return False
    has_tensor_cores = capability >= (8, 0) or (call.is_half and capability >= (7, 0))
    alignment = (8 if call.is_half else 4) if has_tensor_cores else 1
    if (
        not _shapes_fit(call)
        or size != call.key.shape[-1]
        or any(n == 0 or n % alignment for n in (size, call.value.shape[-1]))
    ):
        return False
    if not call.has_unit_strides or not _heads_fit(call, takes_groups=_IS_2_15):
        return False
    is_alignment_checked = _IS_2_15 and capability >= (8, 0)
    return not is_alignment_checked or not any(
        tensor.storage_offset() % alignment for tensor in call.tensors if tensor.numel()
    )


def _cudnn_takes(capability: tuple[int, int], call: AttentionCall) -> bool:
    """Return whether cuDNN's kernel takes the call on devices of this compute capability in all versions of
    cuDNN."""
    sizes = call.query.shape[-1], call.value.shape[-1]
    return (
        capability >= (8, 0)
        and call.is_half
        and _shapes_fit(call)
        and call.has_unit_strides
        and not (call.mask is not None and call.mask.requires_grad)
        and all(0 < size <= 128 and size % 8 == 0 for size in sizes)
        and call.key.shape[2] > 1
        and (call.dropout_p * 16).is_integer()
        and _heads_fit(call, takes_groups=True, takes_unequal=True)
    )


def _unknown(kind: DeviceKind, call: AttentionCall, chosen: str) -> str:
    """Return a sentence for the user if devices of ``kind`` may run another kernel than ``chosen``, else "".
    Return `UNTESTED_ON_ROCM` for AMD's devices; `UNKNOWN_CAPABILITY` if the compute capability of a `checked`
    kind is not known and a device of below 8.0 would run another kernel than this fused one; `MATH_FOR_CUDNN`
    if ``chosen`` is "math" and a device of capability 9.x or 10.x may run cuDNN's kernel. A kind that is not
    `checked` gets another remark for all its kernels."""
    capability = kind.compute_capability
    if kind.gpu_target.startswith("gfx"):
        return UNTESTED_ON_ROCM
    if kind.checked and capability is None and chosen in ("flash", "efficient"):
        return UNKNOWN_CAPABILITY if chosen != _fused_kernel((7, 5), call) else ""
    if capability is None or capability[0] not in (9, 10) or chosen != "math":
        return ""
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    return MATH_FOR_CUDNN if is_enabled and _cudnn_takes(capability, call) else ""


# -- the kernels, of calls without a batch with one added -----------------------------------------------


def _flash(call: AttentionCall, scale: float | None) -> torch.Tensor:
    """Return the result of the flash kernel, for which head dims are padded to multiples of 8."""
    size, tensors = call.query.shape[-1], call.tensors
    if padding := -size % 8:
        tensors = tuple(functional.pad(tensor, (0, padding)) for tensor in tensors)  # type: ignore[assignment]
    out = _ATEN._scaled_dot_product_flash_attention(
        *tensors, call.dropout_p, call.is_causal, False, scale=size**-0.5 if scale is None else scale
    )[0]
    return out[..., :size] if padding else out  # type: ignore[no-any-return]


def _efficient(call: AttentionCall, scale: float | None) -> torch.Tensor:
    """Return the result of the memory-efficient kernel. A mask with strides that are not multiples of 8 is
    copied into longer rows."""
    bias = _bias(call)
    if bias is not None:
        size = bias.shape[-1]
        if any(stride % 8 for stride in bias.stride()[:-1]):
            bias = functional.pad(bias, (0, 8 - size % 8))[..., :size]
        bias = bias.expand(*call.query.shape[:3], call.key.shape[2])
    return _ATEN._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        *call.tensors, bias, True, call.dropout_p, call.is_causal, scale=scale
    )[0]


def _cudnn(call: AttentionCall, scale: float | None) -> torch.Tensor:
    return _ATEN._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
        *call.tensors, _bias(call), True, call.dropout_p, call.is_causal, False, scale=scale
    )[0]


def _math(call: AttentionCall, scale: float | None) -> torch.Tensor:
    return _ATEN._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        *call.tensors, _bias(call), call.dropout_p, call.is_causal, scale=scale, enable_gqa=call.enable_gqa
    )[0]


def _bias(call: AttentionCall) -> torch.Tensor | None:
    """Return the mask that is added to the scores, or None without a mask. A boolean mask becomes one of the
    queries' dtype with 0 for True and -inf for False, as the kernel's caller in torch does it."""
    mask = call.mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.scalar_tensor(float("-inf"), dtype=call.query.dtype, device=mask.device)
    return torch.where(mask, 0.0, lowest)


_KERNELS: Final = {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn, "math": _math}
