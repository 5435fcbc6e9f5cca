"""DeepSpeed's DS4Sci_EvoformerAttention in a trace.

Its two kernels run on CUDA only. A trace replaces them by the tensors that they take and make: forward saves
query, key, value, output, biases and the log-sum-exp, and never the matrix of scores; backward makes the
gradients, those of the biases in float32 (deepspeed/ops/deepspeed4science/evoformer_attn.py). A test compares
the tensors with those that this file of DeepSpeed allocates.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from unittest import mock

import torch

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from memfit.trace.signature import dtype_name
from memfit.types.errors import UserError

MODULE = "deepspeed.ops.deepspeed4science.evoformer_attn"
_HALF = (torch.float16, torch.bfloat16)
_SHORTEST, _WIDEST = 17, 64  # residues or rows that attend to each other; head dim
_ROUNDING = 32  # the log-sum-exp has a multiple of this many queries


@contextlib.contextmanager
def trace_evoformer_attention() -> Iterator[None]:
    """Inside this context, replace the CUDA kernels of DS4Sci_EvoformerAttention by functions that allocate
    the same tensors. Do nothing if DeepSpeed's module of them has not been imported before."""
    module = sys.modules.get(MODULE)
    if module is None:
        yield
        return
    with mock.patch.multiple(module, _attention=_forward, attention_bwd=_backward):
        yield


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias1: torch.Tensor, bias2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the output, the log-sum-exp of the scores) of attention over tensors of the shape (*, length,
    heads, head dim). Raises UserError for what the kernel refuses: a dtype other than float16 and bfloat16, a
    length below 17, or a head dim above 64."""
    *leading, length, heads, width = query.shape
    if query.dtype not in _HALF or length < _SHORTEST or max(width, value.shape[-1]) > _WIDEST:
        raise UserError(
            f"DeepSpeed's DS4Sci_EvoformerAttention does not take {query.dtype} tensors with a sequence "
            f"length of {length} and a head dim of {max(width, value.shape[-1])}",
            allowed=f"float16 or bfloat16, with a sequence length of at least {_SHORTEST} and a head dim of "
            f"at most {_WIDEST}",
        )
    out = torch.empty_like(query)
    queries = math.ceil(length / _ROUNDING) * _ROUNDING
    log_sums = torch.empty((math.prod(leading), heads, queries), dtype=torch.float32, device=query.device)
    _report([out, log_sums], [query, key, value, bias1, bias2], query, backward=False)
    return out, log_sums


def _backward(  # noqa: PLR0913 - DeepSpeed's own arguments
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    bias1: torch.Tensor,
    bias2: torch.Tensor,
    bias1_grad: bool,
    bias2_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of query, key, value and the two biases, in the dtype of their arguments (those of
    the biases in that of ``grad``). A bias whose gradient is not asked for gets an empty tensor."""
    grads = [torch.empty_like(t) for t in (query, key, value)]
    delta = torch.empty_like(log_sums)
    bias_grads = [
        torch.zeros_like(bias, dtype=torch.float32) if needs_grad else bias.new_empty(0, dtype=torch.float32)
        for bias, needs_grad in ((bias1, bias1_grad), (bias2, bias2_grad))
    ]
    reads = [grad, query, key, value, out, log_sums, bias1, bias2]
    _report([*grads, delta, *bias_grads], reads, query, backward=True)
    return *grads, *(g.to(grad.dtype) for g in bias_grads)


def _report(
    writes: list[torch.Tensor], reads: list[torch.Tensor], query: torch.Tensor, *, backward: bool
) -> None:
    *leading, length, heads, width = query.shape
    count = math.prod(leading) * heads
    kernel(
        writes,
        read_bytes(reads),
        flops=(10 if backward else 4) * count * length * length * width,
        kind="attention_backward" if backward else "attention",
        shape=(count, length, length, width, 0),
        dtype=dtype_name(query.dtype),
    )
