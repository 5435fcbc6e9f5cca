"""DeepSpeed's attention for Evoformers in a trace: the tensors of its own code, without its CUDA kernels."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.trace.device_kernels import use_device_kernels
from memfit.trace.evoformer_kernel import MODULE
from memfit.types.errors import UserError

ROWS, LENGTH, HEADS, WIDTH = 4, 40, 2, 8


@pytest.fixture(scope="module")
def attention() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("deepspeed.ops.deepspeed4science", exc_type=ImportError)
    return sys.modules[MODULE].DS4Sci_EvoformerAttention


def inputs(*, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shapes = [(1, ROWS, LENGTH, HEADS, width)] * 3
    shapes += [(1, ROWS, 1, 1, LENGTH), (1, 1, HEADS, LENGTH, LENGTH)]
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_forward_saves_no_matrix_of_scores_and_backward_makes_every_gradient(attention: Any) -> None:
    with FakeTensorMode(), use_device_kernels("cuda"):
        query, key, value, *biases = inputs()
        out = attention(query, key, value, list(biases))
        saved = [(tuple(t.shape), t.dtype) for t in out.grad_fn.saved_tensors]
        out.sum().backward()
        gradients = [(t.grad.shape, t.grad.dtype) for t in (query, key, value, *biases)]
    whole = ((1, ROWS, LENGTH, HEADS, WIDTH), torch.bfloat16)
    log_sums = ((ROWS, HEADS, 64), torch.float32)  # 40 queries, rounded up to a multiple of 32
    of_biases = [(tuple(b.shape), torch.bfloat16) for b in biases]
    assert saved == [whole, whole, whole, whole, log_sums, *of_biases]
    assert gradients == [(t.shape, torch.bfloat16) for t in (query, key, value, *biases)]


def test_what_the_kernel_refuses_is_one_line(attention: Any) -> None:
    with FakeTensorMode(), use_device_kernels("cuda"):
        query, key, value, *biases = inputs(width=72)
        with pytest.raises(UserError, match="head dim of 72; allowed: float16 or bfloat16"):
            attention(query, key, value, list(biases))
        query, key, value, *biases = inputs(dtype=torch.float32)
        with pytest.raises(UserError, match="float32"):
            attention(query, key, value, list(biases))


def test_a_trace_for_the_processor_leaves_the_kernel_as_it_is(attention: Any) -> None:
    with FakeTensorMode(), use_device_kernels("cpu"):
        query, key, value, *biases = inputs()
        with pytest.raises((AssertionError, ValueError), match=r"must be on cuda|CPU backend"):  # DeepSpeed's
            attention(query, key, value, list(biases))
