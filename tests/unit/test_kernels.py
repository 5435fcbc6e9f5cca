"""Seconds of single kernels and of collectives on machines that were not measured."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cost.collectives import KINDS, collective_s
from memfit.cost.kernel_model import (
    BROADCAST,
    NARROW,
    STRIDED,
    Kernels,
    Product,
    Scores,
    kernels,
    layout_share,
    product_share,
    shape_of,
)
from memfit.cost.op_time import time_model
from memfit.types.machine import Calibration, Device, Fact, Link, Machine
from memfit.types.trace import OpCall, Phase


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


def card(*, flops: float = 300e12, bandwidth: float = 2e12, link: float = 300e9, **more: Any) -> Device:
    return Device(
        name="card",
        kind="cuda",
        memory_bytes=fact(2**36),
        bandwidth_bytes_s=fact(bandwidth),
        peak_flops={"bfloat16": fact(flops), "float32": fact(flops / 16), "float8": fact(2 * flops)},
        link=Link(name="link", bytes_s=fact(link)),
        **more,
    )


def found(device: Device | None = None) -> Kernels:
    made = kernels(device or card())
    assert made is not None
    return made


def tensor(*shape: int, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"t": [list(shape), [1] * len(shape), dtype]}


def call(name: str, args: list[Any], *, flops: int = 0, moved: int = 0, dtype: str = "bfloat16") -> OpCall:
    return OpCall(
        clock=1,
        op=f"aten.{name}.default",
        signature=json.dumps([f"aten.{name}.default", args, {}]),
        phase=Phase.FORWARD,
        step=0,
        module="",
        dtype=dtype,
        flops=flops,
        moved_bytes=moved,
    )


def product(m: int, n: int, k: int, **more: Any) -> OpCall:
    moved = 2 * (m * k + k * n + m * n)
    return call("mm", [tensor(m, k), tensor(k, n)], flops=2 * m * n * k, moved=moved, **more)


def attention(length: int, *, causal: bool, backward: bool = False) -> OpCall:
    q = tensor(1, 16, length, 128)
    flops = 4 * 16 * length * length * 128
    if backward:
        args = [q, q, q, q, q, tensor(16, length, dtype="float32"), None, None, length, length, 0.0, causal]
        return call("_scaled_dot_product_flash_attention_backward", args, flops=flops * 5 // 2)
    return call("_scaled_dot_product_flash_attention", [q, q, q, 0.0, causal, False], flops=flops)


def test_shapes_are_read_from_signatures() -> None:
    assert shape_of(product(64, 32, 16).signature) == Product(1, 64, 32, 16)
    bias = call("addmm", [tensor(32), tensor(64, 16), tensor(16, 32)])
    assert shape_of(bias.signature) == Product(1, 64, 32, 16)
    assert shape_of(call("bmm", [tensor(7, 64, 16), tensor(7, 16, 32)]).signature) == Product(7, 64, 32, 16)
    grouped = call("_grouped_mm", [tensor(80, 16), tensor(8, 16, 32), tensor(8, dtype="int32")])
    assert shape_of(grouped.signature) == Product(8, 10, 32, 16)
    assert shape_of(call("add", [tensor(3)]).signature) is None
    assert shape_of("no JSON") is None
    scores = shape_of(attention(1024, causal=True, backward=True).signature)
    assert isinstance(scores, Scores)
    assert (scores.backward, scores.share, scores.head_dim) == (True, (1 + 128 / 1024) / 2, 128)


def test_large_products_run_at_the_ratio_of_the_catalog() -> None:
    device = dataclasses.replace(card(), efficiency_ratio={"matmul": fact(0.5)})
    large = product(8192, 8192, 8192)
    assert found(device).seconds(large) == pytest.approx(large.flops / 150e12, rel=0.001)


@pytest.mark.parametrize("shape", [(64, 64, 8192), (8192, 8192, 32), (100, 8192, 8192), (256, 256, 256)])
def test_small_and_skinny_products_reach_less(shape: tuple[int, int, int]) -> None:
    assert product_share(Product(1, *shape), 108) < 0.7 * product_share(Product(1, 8192, 8192, 8192), 108)


def test_float8_and_float32_have_rates_of_their_own() -> None:
    wide, half = product(8192, 8192, 8192, dtype="float32"), product(8192, 8192, 8192)
    byte = product(8192, 8192, 8192, dtype="float8_e4m3fn")
    assert found().seconds(byte) < found().seconds(half) < found().seconds(wide)


def test_causal_attention_does_half_and_backward_takes_longer() -> None:
    whole, causal = attention(16384, causal=False), attention(16384, causal=True)
    assert found().seconds(causal) == pytest.approx(found().seconds(whole) / 2, rel=0.03)
    ratio = found().seconds(attention(16384, causal=True, backward=True)) / found().seconds(causal)
    assert 2.5 < ratio < 4


def test_tiny_kernels_take_their_start() -> None:
    assert found().seconds(call("add", [tensor(1)], moved=6)) == pytest.approx(2e-6, rel=0.01)


def test_strided_broadcast_and_narrow_calls_reach_less_of_the_bandwidth() -> None:
    def share(name: str, *tensors: tuple[list[int], list[int]]) -> float:
        args = [{"t": [shape, strides, "bfloat16"]} for shape, strides in tensors]
        return layout_share(json.dumps([f"aten.{name}", args, {}]))

    rows, turned = ([64, 128], [128, 1]), ([64, 128], [1, 64])
    assert share("add.Tensor", rows, rows) == 1
    assert share("add.Tensor", ([1, 64, 128], [7, 128, 1]), rows) == 1  # a step over one element is none
    assert share("add.Tensor", rows, turned) == STRIDED
    assert share("mul.Tensor", rows, ([128], [1])) == BROADCAST
    assert share("mm.default", rows, turned) == NARROW
    assert share("native_layer_norm.default", rows) == 0.5
    assert layout_share('["memfit.kernel.default",[],{}]') == layout_share("nothing") == 1


def test_rows_that_start_between_16_bytes_are_slow() -> None:
    even, odd = product(4096, 4096, 4096), product(4096, 4097, 4096)
    assert found().seconds(odd) > 3 * found().seconds(even)


def test_without_rates_nothing_is_known() -> None:
    assert kernels(dataclasses.replace(card(), bandwidth_bytes_s=None)) is None


def test_the_host_may_be_what_is_waited_for() -> None:
    model = time_model(card(), Calibration())
    assert model is not None
    tiny = call("add", [tensor(1)], moved=6)
    assert model.total_s([(tiny, 100)]) == pytest.approx(100 * model.issue_s(tiny))
    large = product(8192, 8192, 8192)
    assert model.total_s([(large, 3)]) == pytest.approx(3 * model.op_s(large))


SIZES = st.integers(1, 20000)


@given(m=SIZES, n=SIZES, k=SIZES, more=st.integers(1, 64), faster=st.floats(1, 50), wider=st.floats(1, 50))
def test_law_a_faster_device_is_never_slower(
    m: int, n: int, k: int, more: int, faster: float, wider: float
) -> None:
    slow, fast = found(), found(card(flops=300e12 * faster, bandwidth=2e12 * wider))
    for op in (product(m, n, k), attention(128 * more, causal=True, backward=bool(more % 2))):
        assert fast.seconds(op) <= slow.seconds(op) * (1 + 1e-12)
        assert slow.seconds(op) >= op.flops / 4 / 600e12


# --- collectives


def cluster(link: float = 300e9, network: float = 25e9, *, switched: bool = True) -> Machine:
    channels = {"nccl_multicast_channels": fact(16)} if switched else {}
    return Machine(
        name="c",
        device=card(link=link, **channels),
        device_count=64,
        devices_per_host=8,
        network=Link(name="n", bytes_s=fact(network)),
    )


GROUPS = st.sampled_from([(2, 2), (8, 8), (16, 8), (64, 8), (8, 1), (256, 4)])


@given(kind=st.sampled_from(KINDS), group=GROUPS, size=st.integers(0, 10**11), more=st.integers(0, 10**11))
def test_law_larger_collectives_take_longer(kind: str, group: tuple[int, int], size: int, more: int) -> None:
    assert collective_s(kind, size, *group, cluster()) <= collective_s(kind, size + more, *group, cluster())


@given(
    kind=st.sampled_from(KINDS),
    group=GROUPS,
    size=st.integers(0, 10**11),
    near=st.floats(1, 10),
    far=st.floats(1, 10),
)
def test_law_a_faster_link_is_never_slower(
    kind: str, group: tuple[int, int], size: int, near: float, far: float
) -> None:
    fast = cluster(300e9 * near, 25e9 * far)
    assert collective_s(kind, size, *group, fast) <= collective_s(kind, size, *group, cluster()) * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_sizes_are_priced_as_their_elements(kind: str) -> None:
    sizes = numpy.array([0.0, 1e3, 1e6, 1e9])
    each = [collective_s(kind, float(s), 16, 8, cluster()) for s in sizes]
    assert collective_s(kind, sizes, 16, 8, cluster()) == pytest.approx(each)


def test_large_gathers_reach_the_links_bandwidth() -> None:
    """Bus bandwidth: what one rank receives, over the time."""
    inside = 8e9 * 7 / 8 / collective_s("all_gather", 8e9, 8, 8, cluster())
    assert inside == pytest.approx(240e9, rel=0.02)
    alone = 8e9 * 7 / 8 / collective_s("all_gather", 8e9, 8, 1, cluster())
    assert alone == pytest.approx(23e9, rel=0.02)
    all_ports = 8e9 * 63 / 64 / collective_s("all_gather", 8e9, 64, 8, cluster())
    assert all_ports == pytest.approx(8 * 23e9, rel=0.05)


def test_the_switch_reduces_quicker_than_rings() -> None:
    plain = collective_s("all_reduce", 1e9, 8, 8, cluster(switched=False))
    assert collective_s("all_reduce", 1e9, 8, 8, cluster()) < 0.8 * plain


def test_one_rank_waits_for_nobody() -> None:
    assert collective_s("all_reduce", 1e9, 1, 1, cluster()) == 0
