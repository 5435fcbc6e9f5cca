"""Operators run alone from their signatures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from memfit.runtime import op_benchmark as room
from memfit.runtime.op_benchmark import calibrate, probe
from memfit.trace.signature import describe


class Counter:
    """A counter with values set by hand: every call peaks at 64 bytes and keeps none."""

    source = "test"

    def __init__(self) -> None:
        self.live = 100

    def live_bytes(self) -> int:
        return self.live

    def peak_bytes(self) -> int:
        return self.live + 64

    def reset_peak(self) -> None:
        """Does nothing, as nothing was counted."""


def signature(name: str, *args: Any, **kwargs: Any) -> str:
    return describe(name, args, kwargs)


RUNNABLE = [
    signature("aten.mm.default", torch.ones(4, 8), torch.ones(8, 2)),
    signature("aten.add.Tensor", torch.ones(3), torch.ones(3), alpha=2),
    signature("aten.cat.default", [torch.ones(2), torch.ones(3)]),
    signature("aten._to_copy.default", torch.ones(2), dtype=torch.bfloat16, device=torch.device("cpu")),
    signature("aten.embedding.default", torch.ones(5, 2), torch.tensor([[4, 1]])),
    signature("aten.gather.default", torch.ones(5, 2), 0, torch.tensor([[4, 1]])),
    signature("aten.masked_fill.Scalar", torch.ones(4), torch.tensor([True, False, True, True]), 0.0),
    signature("aten.mul.Tensor", torch.ones(1, 3).expand(4, 3), torch.ones(4, 3).t().t()),
    signature("aten.abs.default", torch.ones(2, dtype=torch.complex64)),
]


@pytest.mark.parametrize("text", RUNNABLE, ids=lambda text: json.loads(text)[0])
def test_a_signature_is_enough_to_run_the_operator(text: str) -> None:
    found = probe(text, Counter())
    assert found is not None
    assert found.seconds > 0
    assert (found.peak_bytes, found.kept_bytes) == (64, 0)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        signature("aten.no_such.default", torch.ones(1)),
        signature("nonsense", torch.ones(1)),
        signature("aten.mm.default", torch.ones(4, 8), torch.ones(4, 8)),
        signature("aten.mm.default", torch.ones(4, 8), object()),
    ],
    ids=["no json", "no operator", "no name", "wrong shapes", "no tensor"],
)
def test_an_operator_that_cannot_run_alone_is_probed_as_none(text: str) -> None:
    assert probe(text, Counter()) is None


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.int64, 0), (torch.bool, True), (torch.uint8, 0), (torch.complex64, 0.5)]
)
def test_made_up_integers_booleans_and_complex_numbers_have_safe_values(
    dtype: torch.dtype, value: float
) -> None:
    name = str(dtype).removeprefix("torch.")
    assert (room._tensor([2, 3], [3, 1], name) == value).all()


def test_made_up_tensors_keep_shape_and_strides() -> None:
    made = room._tensor([4, 3], [1, 4], "float32")
    assert (made.shape, made.stride()) == ((4, 3), (1, 4))
    assert 0.1 <= float(made.min()) <= float(made.max()) <= 1.0
    wide = room._tensor([1000, 3], [0, 1], "float32")
    assert wide.untyped_storage().nbytes() == 3 * 4
    assert (wide == wide[0, 0]).all()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MATMUL_SIZE", 64)
    monkeypatch.setattr(room, "_COPY_BYTES", 2**16)


@pytest.mark.usefixtures("quick")
def test_calibration_measures_rates_and_the_given_operators() -> None:
    texts = [RUNNABLE[0], signature("aten.no_such.default"), RUNNABLE[1]]
    found = calibrate(texts, timing_s=60.0, counter=Counter())
    assert set(found.op_s) == set(found.op_peak_bytes) == {RUNNABLE[0], RUNNABLE[1]}
    assert set(found.flops_s) == {"float32", "bfloat16"}
    assert min(*found.flops_s.values(), found.bandwidth_bytes_s, found.disk_bytes_s) > 0
    assert found.overhead_s >= 0
    assert found.threads == torch.get_num_threads()


@pytest.mark.parametrize(("slow_s", "largest"), [(60.0, 32), (0.0, 16)])
def test_a_large_product_is_measured_only_on_a_fast_accelerator(
    slow_s: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, product = [], torch.mm

    def noted(left: torch.Tensor, right: torch.Tensor, **given: Any) -> torch.Tensor:
        sizes.append(len(left))
        return product(left, right, **given)

    monkeypatch.setattr(torch, "mm", noted)
    for name, value in (("_MATMUL_SIZE", 16), ("_DEVICE_MATMUL_SIZE", 32), ("_SLOW_MATMUL_S", slow_s)):
        monkeypatch.setattr(room, name, value)
    accelerator = torch.device("cpu", 0)  # differs from the host's processor by its index
    assert room._matmul_flops_s(torch.float32, accelerator) > 0
    assert max(sizes) == largest


@pytest.mark.usefixtures("quick")
def test_calibration_stops_when_its_time_is_over() -> None:
    found = calibrate(RUNNABLE, timing_s=0.0, counter=Counter())
    assert found.op_s == {}
    assert found.flops_s
