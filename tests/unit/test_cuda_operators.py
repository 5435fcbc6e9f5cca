"""Traces for CUDA run what torch's own fake CUDA tensors run, under autocast too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cuda_operators
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memfit.trace import device_autocast
from memfit.trace.device_kernels import use_device_kernels
from memfit.types.errors import UserError

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


def test_binary_cross_entropy_under_autocast_is_refused_as_on_a_gpu() -> None:
    with FakeTensorMode(), use_device_kernels("cuda"), torch.autocast("cpu", dtype=torch.bfloat16):
        shares = torch.zeros(4)
        with pytest.raises(UserError, match="under autocast, where torch refuses it on a GPU"):
            functional.binary_cross_entropy(shares, shares)
        functional.binary_cross_entropy_with_logits(shares, shares)
        with torch.autocast("cpu", enabled=False):
            functional.binary_cross_entropy(shares, shares)
    with FakeTensorMode(), use_device_kernels("mps"), torch.autocast("cpu", dtype=torch.bfloat16):
        functional.binary_cross_entropy(torch.zeros(4), torch.zeros(4))


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


# Calls with a weight, and how often torch 2.15's CUDA build casts it: in two calls; in two without the cache;
# in a call without gradients and one with; in two contexts of two; in a checkpoint of two, with its
# recomputation.
_Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CASTS: dict[str, tuple[_Call, list[int]]] = {
    "linear": (functional.linear, [1, 2, 1, 2, 2]),
    "lstm_cell": (lambda x, w: torch.lstm_cell(x, [x[:, :3], x[:, :3]], w, w[:, :3])[0], [1, 2, 1, 2, 2]),
    "gru_cell": (lambda x, w: torch.gru_cell(x, x[:, :4], w, w[:, :4]), [1, 2, 1, 2, 2]),
    "rnn_tanh_cell": (lambda x, w: torch.rnn_tanh_cell(x, x, w, w), [1, 4, 1, 2, 2]),
    "einsum": (lambda x, w: torch.einsum("ab,bc->ac", x, w), [1, 2, 1, 2, 2]),
    "addmv": (lambda x, w: torch.addmv(x[0], w, x[0]), [1, 2, 1, 2, 2]),
    "addr": (lambda x, w: torch.addr(w, x[0], x[0]), [1, 2, 1, 2, 1]),
    "two operators": (lambda x, w: functional.linear(x, w) + torch.mv(w, x[0]), [1, 4, 1, 2, 2]),
}


class _Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].shape == (12, 12) and args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASTS)
def test_autocast_casts_a_weight_as_often_as_torch_does_on_cuda(name: str) -> None:
    call, expected = CASTS[name]

    def two(first_with_gradient: bool = True, **options: Any) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, **options):
            with torch.set_grad_enabled(first_with_gradient):
                call(x, weight)
            return call(x, weight)

    with FakeTensorMode(), use_device_kernels("cuda"):
        weight, x = torch.nn.Parameter(torch.randn(12, 12)), torch.zeros(5, 12)
        actual = []
        for uses in (
            two,
            lambda: two(cache_enabled=False),
            lambda: two(first_with_gradient=False),
            lambda: (two(), two()),
            lambda: checkpoint(two, use_reentrant=False).sum().backward(),
        ):
            with _Casts() as casts:
                uses()
            actual.append(casts.count)
    assert actual == expected
