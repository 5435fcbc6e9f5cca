"""The interval of `estimate` contains the memory that kernels take inside, probed or bounded."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

import memfit
import memfit.planner.workspace_probes
from memfit.api import Prediction
from memfit.cost.workspaces import bound_bytes
from memfit.planner.capacity import needed_bytes
from memfit.runtime import child_process
from memfit.runtime.memory import peak_counter
from memfit.trace.allocation_recorder import AllocationRecorder
from memfit.trace.operators import fact
from memfit.trace.signature import describe

functional = nn.functional
ATEN = torch.ops.aten
_NEGLIGIBLE_BYTES = 8192  # tables of a row
Case = tuple[nn.Module, dict[str, torch.Tensor], Callable[[Any, Any], torch.Tensor]]


class VolumeUNet(nn.Module):
    """3-D U-Net of one level: its convolutions unfold or reorder volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 16, 3, padding=1)
        self.up, self.head = nn.Conv3d(24, 8, 3, padding=1), nn.Conv3d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(x).relu()
        below = self.middle(functional.max_pool3d(first, 2)).relu()
        joined = torch.cat([first, functional.interpolate(below, scale_factor=2)], 1)
        return self.head(self.up(joined).relu())  # type: ignore[no-any-return]


class DepthwiseBlock(nn.Module):
    """As in ConvNeXt: depthwise 7 x 7, norm over channels, two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.wide, self.back = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        return x + self.back(functional.gelu(self.wide(y))).permute(0, 3, 1, 2)


class Adversaries(nn.Module):
    """Generator, and a discriminator with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)
        )
        self.critic = nn.Sequential(
            norm(nn.Conv2d(3, 32, 3, padding=1)), nn.ReLU(), norm(nn.Conv2d(32, 1, 8))
        )


def volumes() -> Case:
    x = torch.rand(2, 1, 16, 16, 16)
    return VolumeUNet(), {"x": x, "y": x.round()}, lambda m, b: functional.mse_loss(m(b["x"]), b["y"])


def images() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), DepthwiseBlock(32), DepthwiseBlock(32))
    return model, {"x": torch.rand(4, 3, 96, 96)}, lambda m, b: m(b["x"]).square().mean()


def digits() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 10),
    )
    return model, {"x": torch.rand(16, 1, 28, 28)}, lambda m, b: m(b["x"]).square().mean()


def adversaries() -> Case:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        made = model.generator(batch["z"])
        return (
            functional.softplus(model.critic(made)).mean()
            + functional.softplus(-model.critic(batch["x"])).mean()
        )

    return Adversaries(), {"z": torch.rand(16, 16, 1, 1), "x": torch.rand(16, 3, 8, 8)}, loss


class Scaled(nn.Module):
    """A scale, then the layer: its input needs a gradient, and the peak is in the layer or the loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.rand(1)), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)  # type: ignore[no-any-return]


def norms() -> Case:
    """Backward of a BatchNorm takes a copy of its input."""
    batch = {"x": torch.rand(4, 16, 64, 64)}
    return Scaled(nn.BatchNorm2d(16)), batch, lambda m, b: (m(b["x"]) * b["x"]).sum()


def masks() -> Case:
    """A product with booleans takes a copy of them in float32."""
    batch = {"x": torch.rand(4, 16, 64, 64)}
    return Scaled(nn.Identity()), batch, lambda m, b: (m(b["x"]) * (b["x"] > 0.5)).sum()


def doubles() -> Case:
    """Targets in float64, as NumPy makes them."""
    batch = {"x": torch.rand(4, 16, 64, 64), "y": torch.rand(4, 16, 64, 64).double()}
    return Scaled(nn.Identity()), batch, lambda m, b: (m(b["x"]) * b["y"]).sum()


def turned() -> Case:
    """A norm over an axis that does not lie last in memory."""
    batch = {"x": torch.rand(4, 16, 64, 64)}
    return Scaled(nn.LayerNorm(64)), batch, lambda m, b: (m(b["x"].transpose(2, 3)) * b["x"]).sum()


class Pyramid(nn.Module):
    """As in UPerNet: a norm over channels leaves channels-last images; beside them, their mean passes a batch
    norm as images of one pixel, whose layout decides that of the convolution after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.join = nn.LayerNorm(width), nn.Conv2d(2 * width, width, 3, padding=1)
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pooled = functional.interpolate(self.pooled(x), size=x.shape[2:], mode="bilinear")
        return self.join(torch.cat([x, pooled], 1))  # type: ignore[no-any-return]


def pyramid() -> Case:
    return Pyramid(128), {"x": torch.rand(4, 128, 3, 3)}, lambda m, b: m(b["x"]).square().mean()


CASES = {
    "volumes": volumes,
    "images": images,
    "digits": digits,
    "adversaries": adversaries,
    "norms": norms,
    "masks": masks,
    "doubles": doubles,
    "turned": turned,
    "pyramid": pyramid,
}
TRAINED = """
import sys
sys.path.insert(0, {folder!r})
import gc
import torch
from memfit.runtime.memory import peak_counter
from test_workspace_intervals import CASES
counter = peak_counter()
torch.set_num_threads({threads})
for name, make in CASES.items():
    before = counter.live_bytes()
    counter.reset_peak()
    model, batch, loss = make()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    print("peak", name, counter.peak_bytes() - before)
    del model, batch, loss, optimizer
    gc.collect()
"""


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty cache of probes for these tests, and processes that are started anew."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child_process, "subprocess", subprocess)
        patch.setattr(
            memfit.planner.workspace_probes.platformdirs, "user_cache_path", lambda name: folder / name
        )
        yield


@pytest.fixture(scope="module")
def truths() -> dict[str, int]:
    """Peaks of plain training loops, measured in a process of their own."""
    text = TRAINED.format(folder=str(Path(__file__).parent), threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("peak ")]
    return {name: int(peak_bytes) for _, name, peak_bytes in rows}


def estimated(name: str, **settings: Any) -> Prediction:
    model, batch, loss = CASES[name]()
    return memfit.estimate(model, batch, loss=loss, optimizer="adamw", **settings)


@pytest.mark.parametrize("name", CASES)
def test_a_probed_estimate_is_within_one_percent_of_the_measured_peak(
    name: str, truths: dict[str, int]
) -> None:
    found = estimated(name).allocated_bytes
    assert found.value == pytest.approx(truths[name], rel=0.01)
    assert found.low <= truths[name] <= found.high
    assert found.high - found.low <= 0.03 * found.value


@pytest.mark.parametrize("name", CASES)
def test_without_probes_the_interval_still_holds_the_measured_peak(name: str, truths: dict[str, int]) -> None:
    found = estimated(name, probe=False)
    assert found.allocated_bytes.low <= truths[name] <= found.allocated_bytes.high


def test_without_probes_the_estimate_names_the_operators_not_probed() -> None:
    found = estimated("volumes", probe=False)
    assert any("not probed" in a and "convolution_backward" in a for a in found.estimate.assumptions)
    assert "not probed" in str(found)
    assert not any("not probed" in a for a in estimated("volumes").estimate.assumptions)


def test_without_probes_the_upper_end_decides_whether_a_plan_fits() -> None:
    found = estimated("volumes", probe=False)
    assert needed_bytes(found.estimate, found.machine) >= found.allocated_bytes.high


def test_probed_operators_are_cached_and_not_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    once = estimated("volumes")

    def refuse(*args: Any, **settings: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(memfit.planner.workspace_probes, "start", refuse)
    assert estimated("volumes").allocated_bytes == once.allocated_bytes


def test_the_interval_is_that_without_probes_if_no_process_can_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*args: Any, **settings: Any) -> Any:
        raise OSError("no process can be started")

    monkeypatch.setattr(memfit.planner.workspace_probes, "start", fails)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path)
    found = estimated("volumes")
    assert found.allocated_bytes == estimated("volumes", probe=False).allocated_bytes


def test_another_machine_is_not_probed_and_gets_a_wider_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memfit.planner.workspace_probes, "start", None)
    found = estimated("volumes", machine="H100-SXM")
    assert any("convolution" in a for a in found.estimate.assumptions)
    assert found.allocated_bytes.high > 1.01 * found.allocated_bytes.value


def test_backward_of_attention_on_cuda_is_bounded_by_its_float32_sums() -> None:
    """2 x 3 heads, 100 queries padded to 128, heads of 80 to 96 (flash) or 128; 200 keys padded to 256."""
    queries, keys = torch.empty(2, 3, 100, 80), torch.empty(2, 3, 200, 80)
    args = [queries, queries, keys, keys]
    flash = describe("aten._scaled_dot_product_flash_attention_backward.default", args, {})
    efficient = describe("aten._scaled_dot_product_efficient_attention_backward.default", args, {})
    assert bound_bytes(flash, "cuda", 1) == 4 * 2 * 3 * 128 * (96 + 1)
    assert bound_bytes(efficient, "cuda", 1) == 4 * 2 * 3 * ((128 + 2 * 256) * 128 + 100)
    assert bound_bytes(flash, "xpu", 1) == bound_bytes(flash, "cuda", 1), "CUDA's kernels stand for its own"


def test_an_estimate_for_another_card_covers_what_backward_of_attention_takes() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = nn.Linear(64, 192, bias=False, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.mixed(x).unflatten(2, (3, 1, 64)).permute(2, 0, 3, 1, 4)
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    batch = {"x": torch.rand(1, 2**16, 64).bfloat16()}
    found = memfit.estimate(Attention(), batch, loss=lambda m, b: m(b["x"]).sum(), machine="A100-80GB-SXM")
    sums_bytes = 4 * 2**16 * (64 + 1)
    assert any("flash_attention_backward" in a for a in found.estimate.assumptions)
    assert found.allocated_bytes.high > found.allocated_bytes.value + sums_bytes / 2


def test_a_model_without_kernels_to_probe_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfit.planner.workspace_probes, "start", None)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    found = memfit.estimate(model, torch.rand(8, 64))
    assert found.allocated_bytes.high == pytest.approx(1.01 * found.allocated_bytes.value)


@pytest.mark.parametrize(
    "shape", [(4, 8, 1, 1), (4, 8, 3, 3), (4, 1, 3, 3), (2, 8, 3, 3, 3), (4, 8, 3)], ids=str
)
def test_a_traced_norm_gives_its_results_the_strides_that_its_kernel_gives_them(
    shape: tuple[int, ...],
) -> None:
    few, last = torch.rand(shape[1]), torch.rand(shape[-1])
    groups = min(4, shape[1])
    sizes, grouped = (shape[0], shape[1], math.prod(shape[2:]), groups), torch.rand(shape[0], groups)
    for x, grad in itertools.product(in_layouts(shape), repeat=2):
        layout = suggest_memory_format(x)  # group_norm makes its inputs dense
        dense, dense_grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        same_strides(ATEN.native_batch_norm.default, [x, few, few, few, few, True, 0.1, 1e-5])
        same_strides(
            ATEN.native_batch_norm_backward.default,
            [grad, x, few, few, few, few, few, True, 1e-5, [True] * 3],
        )
        same_strides(ATEN.native_group_norm.default, [dense, few, few, *sizes, 1e-5])
        same_strides(
            ATEN.native_group_norm_backward.default,
            [dense_grad, dense, grouped, grouped, few, *sizes, [True] * 3],
        )
        _, *statistics = same_strides(ATEN.native_layer_norm.default, [x, [len(last)], last, last, 1e-5])
        same_strides(
            ATEN.native_layer_norm_backward.default,
            [grad, x, [len(last)], *statistics, last, last, [True] * 3],
        )


@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (4, 1, 3, 3), (4, 8, 3, 3)], ids=str)
def test_a_traced_pointwise_operator_gives_its_result_the_strides_of_a_kernels(
    shape: tuple[int, ...],
) -> None:
    for x, y in itertools.product(in_layouts(shape), repeat=2):
        for call in (ATEN.relu, ATEN.sigmoid, ATEN.silu, ATEN.gelu, ATEN.hardswish, ATEN.elu, ATEN.clone):
            same_strides(call.default, [x])
        for call in (ATEN.sigmoid_backward, ATEN.silu_backward, ATEN.gelu_backward, ATEN.tanh_backward):
            same_strides(getattr(call, call.overloads()[0]), [x, y])
        same_strides(ATEN.hardswish_backward.default, [x, x])
        same_strides(ATEN.hardsigmoid_backward.default, [x, x])
        for call in (ATEN.add.Tensor, ATEN.mul.Tensor):
            same_strides(call, [x, y])
            same_strides(call, [x, 2.0])
        same_strides(ATEN.threshold_backward.default, [x, y, 0])
        same_strides(ATEN.leaky_relu_backward.default, [x, x, 0.1, False])
        same_strides(ATEN.where.self, [x > 0.5, x, y])
        same_strides(ATEN.masked_fill.Scalar, [x, x > 0.5, 0.0])
        same_strides(ATEN.mse_loss_backward.default, [torch.tensor(1.0), x, y, 1])
        same_strides(ATEN.smooth_l1_loss_backward.default, [torch.tensor(1.0), x, y, 1, 1.0])
        same_strides(ATEN.huber_loss_backward.default, [torch.tensor(1.0), x, y, 1, 1.0])


def in_layouts(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of the shape: contiguous, with the last two axes stored the other way round, channels last."""
    x = torch.rand(shape)
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), [])
    return [
        x,
        x.transpose(-1, -2).contiguous().transpose(-1, -2),
        *(torch.empty(shape, memory_format=layout).uniform_() for layout in formats),
    ]


def same_strides(call: Any, args: list[Any]) -> tuple[torch.Tensor, ...]:
    """The operator's results, after comparing the strides of the first with those of a traced call."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        with AllocationRecorder("cpu"):
            traced = call(*fakes)
    outputs = call(*args)
    real, of_trace = (outputs[0], traced[0]) if isinstance(outputs, tuple) else (outputs, traced)
    layouts = [a.stride() for a in args if isinstance(a, torch.Tensor)][:2]
    assert of_trace.stride() == real.stride(), f"{call} of tensors with strides {layouts}"
    return outputs  # type: ignore[no-any-return]


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize(
    ("x", "weight", "groups", "dilation"),
    [
        ((2, 24, 20, 20), (24, 24, 3, 3), 1, 1),
        ((2, 24, 20, 20), (24, 1, 3, 3), 24, 1),
        ((1, 16, 40, 40), (16, 4, 3, 3), 4, 2),
        ((2, 8, 12, 12, 12), (8, 8, 3, 3, 3), 1, 1),
        ((2, 64, 200), (64, 64, 5), 1, 2),
        ((1, 8, 30, 30), (8, 8, 3, 3), 1, 1),
        ((1, 16, 8, 16, 16), (16, 16, 3, 3, 3), 1, 1),  # a single volume, which torch takes for small
        ((1, 12, 6, 20, 36), (12, 12, 3, 3, 3), 1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_convolution_takes_more_than_its_bound(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    groups: int,
    dilation: int,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    counter, rank = peak_counter(), len(x) - 2
    rest = [[1] * rank, [0] * rank, [dilation] * rank, transposed, [0] * rank, groups]
    args = [torch.rand(x, dtype=dtype), torch.rand(weight, dtype=dtype), None, *rest]
    out = taken(counter, torch.ops.aten.convolution.default, args)
    taken(
        counter,
        torch.ops.aten.convolution_backward.default,
        [torch.ones_like(out), *args[:2], None, *rest, [True, True, False]],
    )


MIXED = [
    (a, b)
    for a in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
    for b in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda pair: f"{str(pair[0])[6:]}-{str(pair[1])[6:]}")
def test_no_pointwise_kernel_takes_more_than_its_bound_in_mixed_precision(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    counter = peak_counter()
    one, other = ((torch.rand(2**16) * 3 + 1).to(dtype) for dtype in dtypes)
    pairs = [ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.eq.Tensor, ATEN.maximum.default]
    calls: list[tuple[Any, list[Any]]] = [(call, [one, other]) for call in pairs]
    calls += [(ATEN.cat.default, [[one, other]]), (ATEN.where.self, [one > 2, one, other])]
    calls += [(call, [one]) for call in (ATEN.sum.default, ATEN.sigmoid.default)]
    calls += [(ATEN.mul.Tensor, [one, 0.5]), (ATEN.clamp_min.default, [one, 2])]
    if torch.can_cast(torch.result_type(one, other), one.dtype):
        calls += [(ATEN.mul_.Tensor, [one, other]), (ATEN.copy_.default, [one, other])]
    for call, args in calls:
        taken(counter, call, args)


def test_no_kernel_takes_more_than_its_bound_in_any_layout() -> None:
    counter, images, rows = peak_counter(), torch.rand(4, 16, 32, 32), torch.rand(512, 512)
    turned, few = images.to(memory_format=torch.channels_last), torch.rand(16)
    for x, y in itertools.product((images, turned), repeat=2):
        norm = [few, few, few, few]
        _, mean, deviation = ATEN.native_batch_norm.default(y, *norm, True, 0.1, 1e-5)
        taken(counter, ATEN.native_batch_norm.default, [y, *norm, True, 0.1, 1e-5])
        taken(
            counter,
            ATEN.native_batch_norm_backward.default,
            [x, y, few, few, few, mean, deviation, True, 1e-5, [True] * 3],
        )
        taken(counter, ATEN.avg_pool2d.default, [x, [2, 2]])
        taken(counter, ATEN.upsample_nearest2d.default, [x, [64, 64]])
    for x in (rows, rows.t(), torch.rand(512, 1024)[:, ::2]):
        taken(counter, ATEN.mm.default, [x, rows])
        taken(counter, ATEN.addmm.default, [rows[0], rows, x])
        taken(counter, ATEN.native_layer_norm.default, [x, [512], rows[0], rows[0], 1e-5])
        taken(counter, ATEN._softmax.default, [x, 1, False])
        taken(counter, ATEN._log_softmax.default, [x, 0, False])


def test_kernels_that_take_indices_have_a_bound_in_half_precision_and_in_other_layouts() -> None:
    """Only pointwise kernels are known to take nothing in any precision."""
    ids, images = torch.arange(64), torch.rand(2, 4, 8, 8)
    pooled, places = ATEN.max_pool2d_with_indices.default(images, [2, 2])
    calls: list[tuple[Any, list[Any]]] = [
        (ATEN.embedding_dense_backward.default, [torch.rand(64, 8).bfloat16(), ids, 64, -1, False]),
        (ATEN.embedding_dense_backward.default, [torch.rand(8, 64).t(), ids, 64, -1, False]),
        (ATEN.max_pool2d_with_indices.default, [images.bfloat16(), [2, 2]]),
        (
            ATEN.max_pool2d_with_indices_backward.default,
            [
                pooled,
                images.to(memory_format=torch.channels_last),
                [2, 2],
                [2, 2],
                [0, 0],
                [1, 1],
                False,
                places,
            ],
        ),
    ]
    for call, args in calls:
        assert bound_bytes(describe(str(call), args, {}), "cpu", 1) > 0, str(call)
        taken(peak_counter(), call, args)


@pytest.mark.parametrize(("rows", "widths"), [(160, (24, 24, 8)), (32, (60, 12, 40))])
def test_no_bilinear_layer_takes_more_than_its_bound(rows: int, widths: tuple[int, int, int]) -> None:
    """Its gradients are products of three tensors, larger than all of them."""
    counter, (left, right, out) = peak_counter(), widths
    x, y, grad = torch.rand(rows, left), torch.rand(rows, right), torch.rand(rows, out)
    weight = torch.rand(out, left, right)
    for args in (
        [x, weight, y, [1, 3], [0], [1, 2], [2, 3]],
        [grad, weight, y, [2, 3], [0], [1, 2], [1, 3]],
        [x, grad, y, [1, 3], [2, 3], [1, 2], [0]],
        [x, weight, grad, [1, 3], [0], [2, 3], [1, 2]],
    ):
        taken(counter, ATEN._trilinear.default, args)


def test_a_grouped_convolutions_backward_counts_the_operations_of_each_group_once() -> None:
    """Otherwise a depthwise one seems too large to be probed."""
    images, rest = torch.rand(2, 8, 6, 6), [None, [1, 1], [1, 1], [1, 1], False, [0, 0]]
    for groups in (1, 2, 8):
        weight = torch.rand(8, 8 // groups, 3, 3)
        args = [images, images, weight, *rest, groups, [True, True, False]]
        count = fact(ATEN.convolution_backward.default).count
        assert count is not None
        assert (
            count(*args, out_val=ATEN.convolution_backward.default(*args))
            == 2 * 2 * weight.numel() * 2 * 6 * 6
        )


def taken(counter: Any, call: Any, args: list[Any]) -> torch.Tensor:
    """The first output, after comparing what the call took inside with its bound."""
    call(*args)  # allocates what it keeps for later calls
    counter.reset_peak()
    outputs = call(*args)
    extra_bytes = counter.peak_bytes() - counter.live_bytes()
    bound = bound_bytes(describe(str(call), args, {}), "cpu", torch.get_num_threads())
    assert extra_bytes <= bound + _NEGLIGIBLE_BYTES, str(call)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert isinstance(first, torch.Tensor)
    return first


def test_an_invalid_probe_cache_file_is_treated_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{not json")
    assert memfit.planner.workspace_probes._read(path) == {}
    path.write_text(json.dumps({"key": [1]}))
    assert memfit.planner.workspace_probes._read(path) == {}
