"""Grouped matrix products of every dtype on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.model.grouped_mm import grouped_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fake_grouped_product_has_the_shape_dtype_and_strides_of_the_real_one(dtype: torch.dtype) -> None:
    def product() -> torch.Tensor:
        left, right = torch.ones(24, 16, dtype=dtype), torch.ones(3, 16, 32, dtype=dtype)
        ends = torch.tensor([8, 16, 24], dtype=torch.int32)
        return torch.nn.functional.grouped_mm(left, right, offs=ends)

    real = product()
    with grouped_products(), FakeTensorMode():
        fake = product()
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_outside_the_context_torch_refuses_float32_grouped_products_on_fake_tensors() -> None:
    with pytest.raises(RuntimeError, match="BF16"), FakeTensorMode():
        torch.nn.functional.grouped_mm(
            torch.ones(8, 16), torch.ones(1, 16, 32), offs=torch.tensor([8], dtype=torch.int32)
        )
