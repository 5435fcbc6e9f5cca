"""Traces for CUDA run what torch's own fake CUDA tensors run, under autocast too."""

from __future__ import annotations

import json
from typing import Any

import cuda_operators
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.trace import device_autocast
from memfit.trace.device_kernels import use_device_kernels

RECORD: dict[str, Any] = json.loads(cuda_operators.RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("setting", cuda_operators.SETTINGS)
def test_calls_under_autocast_run_the_operators_that_torch_runs_on_cuda(setting: str) -> None:
    dtype, autocast_dtype = cuda_operators.SETTINGS[setting]
    different = {}
    with FakeTensorMode(), use_device_kernels("cuda"):
        for name, call in cuda_operators.calls("cpu", dtype).items():
            with torch.autocast("cpu", dtype=autocast_dtype, cache_enabled=False):
                if (actual := cuda_operators.operators(call)) != RECORD[setting][name]:
                    different[name] = {"trace": actual, "cuda": RECORD[setting][name]}
    assert different == {}


def test_the_lists_of_autocast_name_operators_that_torch_casts_on_cuda() -> None:
    registered = set(torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"))
    groups = (
        device_autocast._LOWER_PRECISION,
        device_autocast._FLOAT32_RESULT,
        device_autocast._FLOAT32_RESULT_OF,
        device_autocast._WIDEST,
        device_autocast._REFUSED,
    )
    assert [name for group in groups for name in group if name not in registered] == []


def test_autocast_of_the_host_is_as_before_after_a_trace_for_cuda() -> None:
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.long)

    def loss() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.nn.functional.cross_entropy(logits.bfloat16(), labels).grad_fn

    before = repr(loss().next_functions[0][0])
    with FakeTensorMode(), use_device_kernels("cuda"):
        pass
    assert repr(loss().next_functions[0][0]).split()[0] == before.split()[0] == "<LogSoftmaxBackward0"


def test_operators_that_libraries_cast_for_cuda_are_left_to_them() -> None:
    """As torchvision does, whose import made every trace for CUDA fail."""
    with torch.library._scoped_library("library_of_test", "DEF") as library:
        library.define("cropped(Tensor x) -> Tensor")
        library.impl("cropped", lambda x: x, "AutocastCUDA")
        with FakeTensorMode(), use_device_kernels("cuda"):
            torch.nn.functional.softmax(torch.zeros(2, 2), -1)
